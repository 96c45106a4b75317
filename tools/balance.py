"""What skewed patterns cost: time of the kernels relative to a uniform pattern of as many nonzeros.

Every pattern runs once a round on the same activations, in one process, and begins every round in another place of the
order. A figure is the median over the rounds of its time over that of the uniform pattern in the same round. Forward is
spmm, dx spmm_t, dW sddmm, and both is the backward pass of a layer.
Usage: python tools/balance.py [--rounds 15] [--isas avx512 avx2] [--blocks 1 4] [--shapes 4096x1024 1024x4096]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import rarefy  # noqa: F401  (registers the ops)
from rarefy.ops import Index, library
from rarefy.pattern import Pattern


def counts_of(weights: Tensor, num_units: int, most: int) -> Tensor:
    """Integers in proportion to `weights` (n,), at most `most` each, that sum to `num_units`."""
    counts = torch.zeros(weights.numel(), dtype=torch.long)
    weights = weights.double()
    while (left := num_units - int(counts.sum())) > 0:
        room = most - counts
        share = torch.where(room > 0, weights, 0.0)
        extra = torch.minimum((share / share.sum() * left).floor().long(), room)
        if int(extra.sum()) == 0:
            extra = torch.zeros_like(counts)
            extra[torch.topk(torch.where(room > 0, weights, -1.0), min(left, int((room > 0).sum()))).indices] = 1
        counts += extra
    return counts


def by_rows(weights: Tensor, cols: int, num_units: int, generator: torch.Generator) -> Tensor:
    """A boolean map (rows, cols) of units, with columns uniform in each row."""
    counts = counts_of(weights, num_units, cols)
    rank = torch.rand(weights.numel(), cols, generator=generator).argsort(1).argsort(1)
    return rank < counts[:, None]


def uniform(n: int, generator: torch.Generator) -> Tensor:
    """Equal shares."""
    return torch.ones(n)


def one_full(n: int, generator: torch.Generator) -> Tensor:
    """One takes all it can hold."""
    weights = torch.ones(n)
    weights[n // 3] = 1e9
    return weights


def half_heavy(n: int, generator: torch.Generator) -> Tensor:
    """A random half holds 90%."""
    weights = torch.full((n,), 0.1)
    weights[torch.randperm(n, generator=generator)[: n // 2]] = 0.9
    return weights


def power_law(n: int, generator: torch.Generator) -> Tensor:
    """The k-th largest holds 1 / k, in random order."""
    return (1.0 / torch.arange(1, n + 1))[torch.randperm(n, generator=generator)]


def first_quarter(n: int, generator: torch.Generator) -> Tensor:
    """The first quarter holds 90%."""
    weights = torch.full((n,), 0.1 / 3)
    weights[: n // 4] = 0.9
    return weights


Weigh = Callable[[int, torch.Generator], Tensor]
SKEWS: dict[str, tuple[Weigh, bool]] = {  # and whether it is the columns that are skewed
    "uniform": (uniform, False),
    "one row full": (one_full, False),
    "one column full": (one_full, True),
    "half the rows hold 90%": (half_heavy, False),
    "half the columns hold 90%": (half_heavy, True),
    "power law over rows": (power_law, False),
    "power law over columns": (power_law, True),
    "first quarter of the rows holds 90%": (first_quarter, False),
    "first quarter of the columns holds 90%": (first_quarter, True),
}


def skewed(name: str, shape: tuple[int, int], density: float, block: int, seed: int = 0) -> Pattern:
    """A pattern of round(density * n) units with the skew named."""
    generator = torch.Generator().manual_seed(seed)
    weigh, columns = SKEWS[name]
    rows, cols = shape[0] // block, shape[1] // block
    if columns:
        rows, cols = cols, rows
    units = by_rows(weigh(rows, generator), cols, round(density * rows * cols), generator)
    units = units.T if columns else units
    return Pattern.from_units(units.flatten().nonzero().flatten(), shape, block)


def calls_of(pattern: Pattern, x: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """The four calls timed."""
    index = Index.of(pattern)
    values = torch.randn(pattern.num_units, *(() if pattern.block == (1, 1) else pattern.block))
    ops = torch.ops.rarefy
    return {
        "forward": lambda: ops.spmm(values, *index, x),
        "dx": lambda: ops.spmm_t(values, *index, dy),
        "dW": lambda: ops.sddmm(*index, dy, x),
        "both": lambda: ops.spmm_backward(values, *index, dy, x, [True, True, True]),
    }


def measure(shape: tuple[int, int], block: int, density: float, tokens: int, rounds: int) -> None:
    """One table."""
    x, dy = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
    calls = {name: calls_of(skewed(name, shape, density, block), x, dy) for name in SKEWS}
    order = list(SKEWS)
    times: dict[tuple[str, str], list[float]] = {(name, op): [] for name in SKEWS for op in calls["uniform"]}
    for turn in range(rounds + 1):
        for op in calls["uniform"]:
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                begin = time.perf_counter()
                calls[name][op]()
                if turn > 0:
                    times[name, op].append(time.perf_counter() - begin)
    for name in SKEWS:
        cells = []
        for op in calls[name]:
            pairs = zip(times[name, op], times["uniform", op], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            cells.append(f"{1e3 * statistics.median(times[name, op]):.2f} ms" if name == "uniform" else f"{ratio:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isas", nargs="+", default=library.isas()[:2])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--shapes", nargs="+", default=["4096x1024", "1024x4096"])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    for isa in options.isas:
        library.set_isa(isa)
        for block in options.blocks:
            for shape in options.shapes:
                rows, cols = map(int, shape.split("x"))
                print(f"\n| {shape}, {block}x{block}, {isa} | forward | dx | dW | both |\n|---|---|---|---|---|")
                measure((rows, cols), block, options.density, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
