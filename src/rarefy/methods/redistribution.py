"""Units that move between layers by salience. The rule is that of Mostafa & Wang 2019, "Parameter efficient training of
deep convolutional neural networks by dynamic sparse reparameterization", arXiv:1902.05967, Algorithm 1: a layer gets in
proportion to its units that pass one threshold for all layers. Ours names the share that passes instead of adapting a
threshold, keeps totals exact, and bounds what one event may move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.distributions import spread
from rarefy.selection import kth_lowest, num_true, positions


@dataclass(frozen=True, kw_only=True)
class Redistribution:
    """A layer's part of the total follows its part of the units that score highest over all layers.

    Raises:
        ValueError: an option outside (0, 1].
    """

    salient: float = 0.5
    """Share of all layers' units that count: those of highest drop score, whatever their layer."""

    most: float = 0.1
    """Part of its units, rounded up, that a layer may win or lose at one event."""

    least: float = 0.2
    """No layer falls below this share of the mean density, or loses units once it is below."""

    def __post_init__(self) -> None:
        for name in ("salient", "most", "least"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"redistribute: {name} must lie in (0, 1], got {getattr(self, name)}")

    def counts(self, scores: Sequence[Tensor], sizes: Sequence[int], total: int) -> list[int]:
        """Units per layer, `total` together.

        Args:
            scores: (K_l,) of each layer's units, none of them NaN.
            sizes: n_l.
            total: at most the units that there are now.
        """
        now = [score.numel() for score in scores]
        here = sum(now)
        if not here:
            return now
        passing = [0] * len(now)
        num_salient = max(1, math.floor(self.salient * here + 0.5))
        for at, gone in enumerate(split_lowest(scores, here - num_salient)):
            passing[at] = now[at] - gone
        base = [count * total / here for count in now]
        floors = [max(1, round(self.least * total * size / sum(sizes))) for size in sizes]
        low = [max(math.floor((1 - self.most) * b), min(math.floor(b), f)) for b, f in zip(base, floors, strict=True)]
        high = [min(math.ceil((1 + self.most) * b), size) for b, size in zip(base, sizes, strict=True)]
        wanted = {str(at): total * part / num_salient for at, part in enumerate(passing)}
        bounds = [{str(at): bound for at, bound in enumerate(each)} for each in (low, high)]
        return list(spread(wanted, total, *bounds).values())


def split_lowest(scores: Sequence[Tensor], k: int) -> list[int]:
    """How many of the k lowest scores each layer has; of equal scores the earlier layer's, and its lower units, count
    first.
    """
    if not k:
        return [0] * len(scores)
    every = torch.cat([score.flatten() for score in scores])
    threshold = kth_lowest(every, k)
    counts, left = [], k - num_true(every < threshold)
    for score in every.split([score.numel() for score in scores]):
        equals = min(num_true(score == threshold), left)
        counts.append(num_true(score < threshold) + equals)
        left -= equals
    return counts


def by_global_score(scores: Sequence[Tensor], total: int) -> list[int]:
    """Units that each layer keeps if the `total` of highest score stay, whatever their layer; one at least of each.

    Ties go by layer, then by unit: the earlier is dropped first, as within a layer (rule 5.2).
    """
    num_dropped = sum(score.numel() for score in scores) - total
    if num_dropped <= 0:
        return [score.numel() for score in scores]
    kept = []
    for score in scores:
        score = score.clone()
        if score.numel():  # its best unit, the last of equals, so that no layer collapses
            score[positions(score.flatten() == score.max())[-1]] = math.inf
        kept.append(score)
    return [s.numel() - gone for s, gone in zip(kept, split_lowest(kept, num_dropped), strict=True)]
