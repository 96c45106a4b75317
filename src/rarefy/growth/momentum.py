"""A few candidates, watched for some steps: their mean gradient says more than one step's. The idea of growing by
gradient momentum is Dettmers & Zettlemoyer's 2019 ("Sparse Networks from Scratch", arXiv:1907.04840, section 3), who
keep it for every weight, the absent ones too.

Departs from the paper in following a pool of candidates only, and for the last steps before a rewire only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.groups import Group, groups_of, split_over
from rarefy.growth.signal import Collector, Found, GrowScore, Request, Signal, pattern_of, unit_scores
from rarefy.ops.index import Index
from rarefy.ops.spread import sddmm
from rarefy.pattern import Pattern
from rarefy.sampling import keyed_generator
from rarefy.selection import highest, random_absent


@dataclass(frozen=True, kw_only=True)
class Momentum(Signal):
    """The exponential mean of the gradients of a pool of absent units, over the last steps before the rewire.

    The pool is drawn at the first of these steps. Costs an sddmm of pool * k units at each, O(pool * k * B) time (and
    of the K units that exist, if they may return), and at most 8 bytes an entry and 20 a unit of the pool.
    """

    pool: float = 2.0
    """Candidates, as a multiple of the units wanted."""

    steps: int = 10
    """Steps watched, the rewire's own last."""

    beta: float = 0.9
    """Decay of the mean a step; 0: the last step alone."""

    source: Signal | None = None
    """The signal whose best become the pool; None: drawn uniformly at random."""

    def __post_init__(self) -> None:
        if not self.pool >= 1:
            raise ValueError(f"pool must be at least 1, got {self.pool}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if self.source is not None and (self.source.lead > 1 or self.steps < 2):
            raise ValueError("a source looks at one step, the first of at least two: use one without steps of its own")

    @property
    def lead(self) -> int:
        """See `Signal`."""
        return self.steps

    def collector(self, request: Request) -> _Watched:
        """See `Signal`."""
        return _Watched(request, self)

    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """See `Signal`."""
        pool = self.pool_size(k)
        first = 0 if self.source is None else self.source.held_bytes(shape, pool, unit_entries)
        return max(first, pool * (8 * unit_entries + 20))  # two gradients; the pool and its index

    def pool_size(self, k: int) -> int:
        """Candidates for k wanted units."""
        return round(self.pool * k)


class _Watched(Collector):
    def __init__(self, request: Request, signal: Momentum) -> None:
        super().__init__(request)
        self._signal = signal
        self._size = signal.pool_size(request.k)
        self._source: Collector | None = None
        if signal.source is not None:
            self._source = signal.source.collector(dataclasses.replace(request, k=self._size))
        self._pool: Tensor | None = None
        self._pool_index: Index | None = None
        self._now: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        if self._pool is None and self._source is not None:
            self._source.add(index, dy, x)
            return
        if self._pool is None:
            self._pool = self._drawn(index)
        if self._pool_index is None:
            shape, (b_r, b_c) = (index.out_features, index.in_features), index.block
            self._pool_index = Index.of(Pattern.from_sorted_units(self._pool, shape, (b_r, b_c)))
        now = {"pool": sddmm(self._pool_index, dy, x)}
        if self.request.returns:
            now["active"] = sddmm(index, dy, x)
        if self.calls > 1:
            now = {name: self._now[name] + gradient for name, gradient in now.items()}
        self._now = now

    def _drawn(self, index: Index) -> Tensor:
        request = self.request
        generator = keyed_generator(request.seed, request.step, request.name, "pool")
        drawn = []
        for group, size in self._sizes(index):
            active, every = group.pattern.unit_indices(), group.units.stop - group.units.start
            absent = random_absent(active, every, min(size, every - active.numel()), generator)
            drawn.append(group.units.start + absent)
        return torch.cat(drawn)

    def _sizes(self, index: Index) -> list[tuple[Group, int]]:
        """Each group of rows that grows alone, and its part of the pool."""
        groups = list(groups_of(pattern_of(index), self.request.groups))
        return list(zip(groups, split_over(self._size, groups), strict=True))

    def _chosen(self, index: Index, found: Found) -> Tensor:
        """The best of each group, by the source."""
        best = []
        for group, size in self._sizes(index):
            here = (found.units >= group.units.start) & (found.units < group.units.stop)
            best.append(highest(found.scores[here], found.units[here], size))
        return torch.cat(best)

    def step_applied(self, index: Index) -> None:
        """What this step saw joins the mean; or the pool is chosen by it."""
        source = self._source
        if self._pool is None and source is not None:
            useless = self.calls == 0 or (self.calls > 1 and not source.combines)
            if not self.request.ranks.any_rank(useless, index.crow.device):
                found = source.found(index, self.request.grow_score)
                if bool(torch.isfinite(found.scores).all()):
                    self._pool, self._source = self._chosen(index, found), None
        self._fold()
        self.calls = 0

    def _fold(self) -> None:
        beta = self._signal.beta
        for mean in self._mean.values():  # a step in which the layer took no part counts as zeros, on every rank
            mean.mul_(beta)
        for name, gradient in self._now.items():
            if name in self._mean:
                self._mean[name].add_(gradient, alpha=1 - beta)
            else:
                self._mean[name] = gradient.mul_(1 - beta)
        self._now = {}

    @property
    def combines(self) -> bool:  # type: ignore[override]
        """Whether a step of several calls can be used: the source's, as long as it is asked."""
        return self._source is None or self._source.combines

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        if self._pool is None:  # the layer took no part in the steps before: this one's best are all there is
            assert self._source is not None
            return self._source.found(index, grow_score)
        self._fold()
        means = {name: self.request.ranks.mean_over_ranks(mean) for name, mean in self._mean.items()}
        returning = unit_scores(means["active"], grow_score) if self.request.returns else None
        return Found(self._pool, unit_scores(means["pool"], grow_score).to(torch.float32), returning)

    def state_dict(self) -> dict[str, Any]:
        if self._pool is None:
            return {}
        return {"pool": self._pool.clone(), "mean": {name: mean.clone() for name, mean in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self._pool, self._source = state["pool"].clone(), None
            self._mean = {name: mean.clone() for name, mean in state["mean"].items()}
