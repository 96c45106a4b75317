"""Drawing units at random, exactly: the right number, uniform, without replacement, in memory that follows the draw."""

from __future__ import annotations

import hashlib
import heapq

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | np.random.Generator | None
"""What draws: a torch or numpy generator; None: torch's global one."""


def keyed_generator(*key: object) -> np.random.Generator:
    """A counter-based generator that depends on its key alone: no state to save, the same on every machine and rank.

    Args:
        key: ints and strings, such as (seed, step, layer name).
    """
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def exponentials(shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """float32 draws E of the unit exponential, above 0. The same numbers follow each other however they are shared out.

    With weights w, the k largest w / E are a sample of k without replacement, each drawn with probabilities in
    proportion to the weights that are left (Efraimidis & Spirakis 2006).
    """
    return torch.from_numpy(generator.standard_exponential(shape, dtype=np.float32)).clamp_(min=1e-20)


def integers(below: int, count: int, generator: Generator = None) -> Tensor:
    """(count,) int64 uniform in [0, below), with replacement."""
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.integers(below, size=count))
    return torch.randint(below, (count,), generator=generator)


def sample_without_replacement(n: int, k: int, generator: Generator = None) -> Tensor:
    """(k,) int64 distinct indices below n, ascending, uniform over all such sets.

    Draws on the CPU, so that a seed means the same units on every device. Memory O(k) below half of n.

    Raises:
        ValueError: k is not in [0, n].
    """
    if not 0 <= k <= n:
        raise ValueError(f"cannot draw {k} of {n} units")
    if 2 * k > n:  # the complement is the smaller draw
        keep = torch.ones(n, dtype=torch.bool)
        keep[sample_without_replacement(n, n - k, generator)] = False
        return keep.nonzero().flatten()
    if not k:
        return torch.empty(0, dtype=torch.int64)
    # Drawing with replacement and keeping the first k distinct values, in order of appearance, is uniform over sets.
    drawn = integers(n, int(1.1 * k) + 16, generator)
    values, first = first_appearances(drawn)
    while values.numel() < k:
        drawn = torch.cat([drawn, integers(n, int(1.1 * (k - values.numel())) + 16, generator)])
        values, first = first_appearances(drawn)
    return values[first <= first.kthvalue(k).values]


def first_appearances(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of `drawn`, ascending, and where each first appears."""
    values, order = torch.sort(drawn, stable=True)
    is_first = torch.ones_like(values, dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=is_first[1:])
    return values[is_first], order[is_first]


def repair_empty_rows(units: Tensor, rows: int, cols: int, generator: Generator = None) -> Tensor:
    """Ascending units in which each empty row took one unit of the fullest row of that moment (rewiring rule 3.1).

    Args:
        units: (K,) ascending flat row-major indices in a rows x cols grid. With K < rows nothing is moved.
    """
    counts = torch.bincount(units // max(cols, 1), minlength=rows)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty or units.numel() < rows:
        return units
    by_row = [row.tolist() for row in torch.split(units, counts.tolist())]
    fullest = [(-len(row), index) for index, row in enumerate(by_row)]
    heapq.heapify(fullest)
    for row in empty:
        count, giver = fullest[0]
        by_row[giver].pop(int(integers(-count, 1, generator)))
        heapq.heapreplace(fullest, (count + 1, giver))
        by_row[row].append(row * cols + int(integers(cols, 1, generator)))
    return torch.tensor(sorted(unit for row in by_row for unit in row), dtype=torch.int64)
