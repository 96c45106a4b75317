"""Choosing exactly k units. Numbers in parentheses are the rewiring rules."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rarefy.sampling import Generator, sample_without_replacement


def round_half_up(fraction: float, num_active: int) -> int:
    """floor(fraction * K + 1/2) (5.1).

    Raises:
        ValueError: the fraction is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a method's fraction must lie in [0, 1], got {fraction}")
    return math.floor(fraction * num_active + 0.5)


def num_to_replace(fraction: float, num_active: int, num_all: int) -> int:
    """k = min(floor(fraction * K + 1/2), n - K): as many dropped as grown (5.1, 6.6). Raises as `round_half_up`."""
    return min(round_half_up(fraction, num_active), num_all - num_active)


def positions(mask: Tensor) -> Tensor:
    """Ascending int64 positions of the true entries of a flat mask."""
    if mask.device.type == "cpu":  # several times faster than torch's
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()


def put(numbers: Tensor, mask: Tensor) -> Tensor:
    """The numbers, in order, at the true entries of a flat mask that has as many; 0 elsewhere."""
    into = numbers.new_zeros(mask.numel())
    if mask.device.type == "cpu":  # torch would list the positions first
        into.numpy()[mask.numpy()] = numbers.numpy()
    else:
        into[mask] = numbers
    return into


def num_true(mask: Tensor) -> int:
    """How many entries are true."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN: least and greatest tell, as a NaN is both."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


SAMPLED = 4096
"""Scores that are sorted to learn where about the k-th lies."""


def kth_lowest(score: Tensor, k: int) -> Tensor:
    """The k-th lowest score, k from 1; NaN counts as the highest. O(K), most of it in comparisons.

    A sample of the scores gives two between which it should lie, and few others do. If it does not, all are looked at.
    """
    stride = score.numel() // SAMPLED
    if stride < 4:
        return score.kthvalue(k).values
    sample = score[::stride].sort().values
    rank, margin = k // stride, 2 * math.isqrt(SAMPLED)
    low, high = sample[max(rank - margin, 0)], sample[min(rank + margin, sample.numel() - 1)]
    num_lower = num_true(score < low) if rank >= margin else 0
    near = score <= high if rank + margin < sample.numel() else torch.ones_like(score, dtype=torch.bool)
    if rank >= margin:
        near &= score >= low
    between = score[positions(near)]
    if not num_lower < k <= num_lower + between.numel():
        return score.kthvalue(k).values
    return between.kthvalue(k - num_lower).values


def lowest(score: Tensor, k: int) -> Tensor:
    """Ascending indices of the k lowest scores; of equal scores the lower indices (5.2). O(K): a selection, not a
    sort.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    threshold = kth_lowest(score, k)
    taken = positions(score <= threshold)
    excess = taken.numel() - k
    if excess > 0:
        equals = positions(score[taken] == threshold)
        kept = torch.ones_like(taken, dtype=torch.bool)
        kept[equals[-excess:]] = False
        taken = taken[kept]
    return taken


def highest(score: Tensor, units: Tensor, k: int) -> Tensor:
    """Of candidate `units`, in any order, the k of highest score, ascending; of equal scores the lower units (6.2)."""
    if k >= units.numel():
        return _ascending(units)
    if k:  # most fall at once: what is left to sort is little more than k
        likely = positions(score >= -kth_lowest(-score, k))
        score, units = score[likely], units[likely]
    units, order = torch.sort(units)
    return units[lowest(-score[order], k)]


def places(score: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """For each item, how many of its group have a lower score; of equal scores the lower index comes before (5.2)."""
    order = torch.sort(score, stable=True).indices
    order = order[torch.sort(groups[order], stable=True).indices]
    sizes = torch.bincount(groups, minlength=num_groups)
    begins = sizes.cumsum(0) - sizes
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - begins[groups[order]]
    return place


SLICE = 1 << 18
"""Numbers that a table of counts covers at a time: its memory follows neither the units nor the matrix."""


def num_below(ascending: Tensor, wanted: Tensor) -> Tensor:
    """For each of `wanted`, which ascend too, how many of `ascending` are lower: by binary search, or by counting where
    that is less.
    """
    if not _counts(ascending, wanted):
        return torch.searchsorted(ascending, wanted)
    below = torch.empty_like(wanted)
    last = max(int(ascending[-1]), int(wanted[-1]))
    begins = torch.arange(0, last + SLICE + 1, SLICE, device=ascending.device)  # one more than slices
    held, asked = (torch.searchsorted(numbers, begins).tolist() for numbers in (ascending, wanted))
    there = torch.empty(min(SLICE, last + 1), dtype=torch.bool, device=ascending.device)
    for i in range(len(begins) - 1):
        if asked[i] == asked[i + 1]:
            continue
        mine = slice(asked[i], asked[i + 1])
        at = wanted[mine] - i * SLICE
        there.zero_().index_fill_(0, ascending[held[i] : held[i + 1]] - i * SLICE, True)
        below[mine] = torch.cumsum(there, 0, dtype=torch.int32)[at] - there[at].int() + held[i]
    return below


def contains(ascending: Tensor, wanted: Tensor) -> Tensor:
    """For each of `wanted`, whether it is in `ascending`; boolean, by binary search, or a table where that is less."""
    if not ascending.numel() or not wanted.numel():
        return torch.zeros(wanted.shape, dtype=torch.bool, device=wanted.device)
    if _counts(ascending, wanted):
        there = torch.zeros(int(ascending[-1]) + 2, dtype=torch.bool, device=ascending.device)
        return there.index_fill_(0, ascending, True)[wanted.clamp(max=there.numel() - 1)]
    at = torch.searchsorted(ascending, wanted).clamp_(max=ascending.numel() - 1)
    return ascending[at] == wanted


def _ascending(units: Tensor) -> Tensor:
    """In order: by a table where they are many and dense."""
    if units.numel() > 1 << 12 and int(last := units.max()) < 8 * units.numel():
        there = torch.zeros(int(last) + 1, dtype=torch.bool, device=units.device)
        return positions(there.index_fill_(0, units, True))
    return torch.sort(units).values


def _counts(ascending: Tensor, wanted: Tensor) -> bool:
    """Whether tables are quicker than searches, which are one kernel on a GPU. A table of all numbers, a byte each, is
    no larger than what is asked about.
    """
    if ascending.device.type != "cpu" or min(ascending.numel(), wanted.numel()) < 1 << 12:
        return False
    return int(ascending[-1]) < 8 * (ascending.numel() + wanted.numel())


def random_absent(present: Tensor, num_all: int, k: int, generator: Generator) -> Tensor:
    """k of the units not in `present`, ascending, uniform without replacement (6.5). Memory O(K + k).

    What is drawn comes from the CPU, so that every device has the same; `present` stays where it is.

    Args:
        present: ascending unit indices that may not be drawn.

    The r-th absent unit is r plus the number of present units before it; present[j] has present[j] - j absent ones
    before.
    """
    ranks = sample_without_replacement(num_all - present.numel(), k, generator)
    ranks = ranks.to(present.device)
    absent_before = torch.arange(present.numel(), device=present.device).neg_().add_(present)
    return ranks + torch.searchsorted(absent_before, ranks, right=True)
