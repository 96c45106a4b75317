"""The methods' rules in plain Python, as one would write them down from the papers: lists, dicts and loops over units.

Nothing here uses the library, but for the keyed draws of random growth. A layer is a dict unit -> |score|, with units
numbered row by row; ties follow the project's rules: of equal magnitudes the lower unit goes first (5.2), of equal
growth scores the lower unit comes first (6.2), and earlier layers before later ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def count(fraction: float, active: int, everything: int) -> int:
    """k of rule 5.1."""
    return min(math.floor(fraction * active + 0.5), everything - active)


def smallest(scores: Mapping[int, float], k: int) -> set[int]:
    return set(sorted(scores, key=lambda unit: (scores[unit], unit))[:k])


def largest(scores: Mapping[int, float], k: int) -> set[int]:
    return set(sorted(scores, key=lambda unit: (-scores[unit], unit))[:k])


def random_growth(active: set[int], num_all: int, ranks: Sequence[int]) -> set[int]:
    """The absent units at these ranks."""
    absent = [unit for unit in range(num_all) if unit not in active]
    return {absent[rank] for rank in ranks}


def set_rule(weights: Mapping[int, float], num_all: int, fraction: float) -> tuple[set[int], int]:
    """Mocanu et al. 2018 by magnitude: units to drop, and how many grow anywhere else."""
    k = count(fraction, len(weights), num_all)
    return smallest({unit: abs(w) for unit, w in weights.items()}, k), k


def rigl_rule(
    weights: Mapping[int, float], gradient: Sequence[float], fraction: float, *, may_return: bool
) -> set[int]:
    """Evci et al. 2020, Algorithm 1: the units after the rewire."""
    drop, k = set_rule(weights, len(gradient), fraction)
    barred = set(weights) - drop if may_return else set(weights)
    scores = {unit: abs(g) for unit, g in enumerate(gradient) if unit not in barred}
    return (set(weights) - drop) | largest(scores, k)


def mest_drop(weights: Mapping[int, float], gradient: Sequence[float], weight: float, k: int) -> set[int]:
    """Yuan et al. 2021: the k units of least |w| + lambda |gradient|."""
    return smallest({unit: abs(w) + weight * abs(gradient[unit]) for unit, w in weights.items()}, k)


def globally_kept(layers: Sequence[Mapping[int, float]], total: int) -> list[set[int]]:
    """The `total` largest |w| over all layers; each layer keeps its largest, the last of equals, come what may."""
    spared = []
    for weights in layers:
        best = max(abs(w) for w in weights.values())
        spared.append(max(unit for unit, w in weights.items() if abs(w) == best))
    order = sorted(
        (math.inf if unit == spared[at] else abs(w), at, unit)
        for at, weights in enumerate(layers)
        for unit, w in weights.items()
    )
    kept: list[set[int]] = [set() for _ in layers]
    for _, at, unit in order[len(order) - total :]:
        kept[at].add(unit)
    return kept


def cubic(start: float, stop: float, progress: float) -> float:
    """Zhu & Gupta 2017, equation 1, of densities."""
    return stop + (start - stop) * (1 - progress) ** 3


def srigl_rule(
    weights: Mapping[int, float],
    gradient: Sequence[float],
    shape: tuple[int, int],
    planned: int,
    fraction: float,
    gamma: float,
    *,
    ablate: bool,
    may_return: bool,
) -> set[int]:
    """Lasby et al. 2023, Algorithm 1, with the departures that the method's docstring names: units afterwards."""
    rows, cols = shape
    k = count(fraction, len(weights), rows * cols)
    if not k:
        return set(weights)
    row = lambda unit: unit // cols  # noqa: E731
    magnitude = {unit: abs(w) for unit, w in weights.items()}
    steepest = {unit: abs(g) for unit, g in enumerate(gradient)}
    living = list(range(rows))
    if ablate:
        salient = (set(weights) - smallest(magnitude, k)) | largest(steepest, k)
        counts = [sum(row(unit) == r for unit in salient) for r in range(rows)]
        needed = max(1, math.floor(gamma * (planned // rows)))
        had = sum(any(row(unit) == r for unit in weights) for r in range(rows))
        fewest = max(math.ceil(had / 2), math.ceil(planned / cols), 1)
        by_count = sorted(range(rows), key=lambda r: (-counts[r], r))
        living = sorted({r for r in range(rows) if counts[r] >= needed} | set(by_count[:fewest]))
    fan_in = min(max(math.floor(planned / len(living) + 0.5), 1), cols)
    # The K - k largest stay; those of neurons that go count among the k.
    ordered = sorted(weights, key=lambda unit: (row(unit) in living, magnitude[unit], unit))
    gone = set(ordered[:k]) | {unit for unit in weights if row(unit) not in living}
    result = set()
    for r in living:
        mine = [unit for unit in ordered if row(unit) == r]
        stay = [unit for unit in mine if unit not in gone][-fan_in:]
        absent = [unit for unit in range(r * cols, (r + 1) * cols) if unit not in weights]
        if may_return:
            absent += [unit for unit in mine if unit not in stay]
        elif len(stay) + len(absent) < fan_in:  # the best of those that would go fill the row
            fill = fan_in - len(stay) - len(absent)
            stay = sorted(stay + [unit for unit in mine if unit not in stay][-fill:])
        grown = largest({unit: steepest[unit] for unit in absent}, fan_in - len(stay))
        result |= set(stay) | grown
    return result
