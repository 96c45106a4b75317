"""How a budget of units is spread over layers: densities per layer, then exact integers (rewiring rules 2.1 to 2.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rarefy.pattern import check_density


def _check(shapes: Mapping[str, Sequence[int]], density: float) -> None:
    check_density(density)
    if not shapes:
        raise ValueError("shapes is empty: there is no layer to spread the density over")


def uniform(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """The same density for every layer.

    Args:
        shapes: dense weight shapes, (out, in) or (out, in, kh, kw).
        density: wanted overall density, in (0, 1].
    Raises:
        ValueError: density outside (0, 1], or `shapes` is empty.
    """
    _check(shapes, density)
    return dict.fromkeys(shapes, float(density))


def er(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Density per layer by Erdos-Renyi: proportional to (out + in) / (out * in), whatever the kernel (Mocanu et al.
    2018).

    Arguments, cap and errors as for `erk`.
    """
    return _proportional(shapes, density, lambda shape: sum(shape[:2]) / math.prod(shape[:2]))


def erk(shapes: Mapping[str, Sequence[int]], density: float, *, power: float = 1.0) -> dict[str, float]:
    """Density per layer by Erdos-Renyi-Kernel: proportional to (sum(shape) / prod(shape)) ** power.

    A layer that would pass density 1 is capped there and the excess spread over the others.

    Args:
        shapes: dense weight shapes, (out, in) or (out, in, kh, kw).
        density: wanted overall density, in (0, 1].
        power: 1 as in the paper; smaller is closer to uniform.
    Returns:
        name -> density in (0, 1], same keys and order as `shapes`.
    Raises:
        ValueError: density outside (0, 1], or `shapes` is empty.
    Source:
        Evci et al. 2020 (arXiv:1911.11134), section 3, "Sparsity Distribution"; the cap is in the authors' code.
    """
    return _proportional(shapes, density, lambda shape: (sum(shape) / math.prod(shape)) ** power)


def _proportional(shapes: Mapping[str, Sequence[int]], density: float, share) -> dict[str, float]:
    """density_l = min(1, c * share_l), with c such that the whole has `density`."""
    _check(shapes, density)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    weight = {name: share(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        wanted = density * sum(size.values()) - sum(size[name] for name in full)
        room = sum(weight[name] * size[name] for name in shapes if name not in full)
        scale = wanted / room if room else 0.0
        over = {name for name in shapes if name not in full and scale * weight[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * weight[name] for name in shapes}
        full |= over


DISTRIBUTIONS = {"uniform": uniform, "er": er, "erk": erk}


def exact_counts(
    densities: Mapping[str, float],
    sizes: Mapping[str, int],
    density: float,
    *,
    least: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Units per layer that sum to exactly round(density * sum of sizes), by largest remainder (rule 2.1).

    Args:
        densities: real density per layer, in [0, 1].
        sizes: n, the units that each layer's matrix has.
        density: overall density.
        least, most: bounds of each layer's units, between which the total must lie; else 0 and n.

    Every layer keeps at least one unit as long as the total allows it. Ties between remainders: earlier layer first.
    """
    return spread(
        {name: densities[name] * sizes[name] for name in sizes},
        round(density * sum(sizes.values())),
        dict.fromkeys(sizes, 0) if least is None else least,
        sizes if most is None else most,
    )


def spread(ideal: Mapping[str, float], total: int, least: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Integers near `ideal`, each between its bounds, that sum to exactly `total`, which lies between theirs.

    By largest remainder, the earlier first where equal; none is 0 as long as the total allows it, whatever `least`.
    """
    counts = {name: min(max(int(ideal[name]), least[name]), most[name]) for name in ideal}
    order = sorted(ideal, key=lambda name: counts[name] - ideal[name])  # largest remainder first; sorted() is stable
    missing = total - sum(counts.values())
    while missing:
        # More than one round only when bounds or rounding in the densities themselves left a larger gap.
        up = missing > 0
        room = {n: most[n] - counts[n] if up else counts[n] - least[n] for n in (order if up else order[::-1])}
        movable = [n for n in room if room[n]][: abs(missing)]
        each = abs(missing) // len(movable)
        for name in movable:
            counts[name] += min(each, room[name]) if up else -min(each, room[name])
        missing = total - sum(counts.values())
    for name in [n for n in counts if counts[n] == 0 and most[n]]:
        richest = max(counts, key=lambda n: counts[n])
        if counts[richest] > 1:
            counts[richest] -= 1
            counts[name] += 1
    return counts
