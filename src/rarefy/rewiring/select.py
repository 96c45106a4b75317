"""Choosing exactly k units. Numbers in parentheses are the rewiring rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.sampling import Generator, sample_without_replacement


def num_to_replace(fraction: float, num_active: int, num_all: int) -> int:
    """k = min(floor(fraction * K + 1/2), n - K): as many dropped as grown (5.1, 6.6).

    Raises:
        ValueError: the fraction is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a method's fraction must lie in [0, 1], got {fraction}")
    return min(math.floor(fraction * num_active + 0.5), num_all - num_active)


def lowest(score: Tensor, k: int) -> Tensor:
    """Indices of the k lowest scores; equal scores by lower index (5.2)."""
    return torch.sort(score, stable=True).indices[:k]


def highest(score: Tensor, units: Tensor, k: int) -> Tensor:
    """Of candidate `units`, the k of highest score; equal scores by lower unit (6.2)."""
    units, order = torch.sort(units)
    return units[torch.sort(score[order], descending=True, stable=True).indices[:k]]


def random_absent(present: Tensor, num_all: int, k: int, generator: Generator) -> Tensor:
    """k of the units not in `present`, ascending, uniform without replacement (6.5). Memory O(K + k).

    Args:
        present: ascending unit indices that may not be drawn.

    The r-th absent unit is r plus the number of present units before it; present[j] has present[j] - j absent ones before.
    """
    ranks = sample_without_replacement(num_all - present.numel(), k, generator)
    absent_before = present.cpu() - torch.arange(present.numel())
    return ranks + torch.searchsorted(absent_before, ranks, right=True)
