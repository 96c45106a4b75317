"""Gradual pruning with zero-cost regeneration. Liu et al. 2021, "Sparse Training via Boosting Pruning Plasticity with
Neuroregeneration", arXiv:2106.10404, section 4.

At each event the network is pruned by one threshold for all layers to a density that falls by a cubic; then each layer
drops part of what is left by magnitude and grows as many by gradient.

Departs from the authors' code in five defaults: regeneration staggers over layers, just-dropped units may not return at
once, the fraction's cosine ends at 0 with the schedule (theirs at 0.005 with the run), the interval is 100 steps
(theirs 1,000 on CIFAR, 4,000 on ImageNet), and each layer keeps at least one unit. `GraNet.paper()` restores the first
two, and the interval. A unit that pruning dropped and regeneration grows again comes back as 0, as theirs does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from rarefy.methods.base import LayerView, Method, Needs
from rarefy.methods.falling import falling, kept_by_score
from rarefy.schedules import Cosine, Schedule


@dataclass(frozen=True, kw_only=True)
class GraNet(Method):
    """Prune globally by a cubic, then drop the smallest of each layer and grow where the dense gradient is largest."""

    start: float = 0.5
    """Density at `begin`: 0.5 sparse to sparse, 1 dense to sparse. The plan's density is the last one."""

    fraction: Schedule = field(default_factory=lambda: Cosine(start=0.5))
    """Part of a layer's units regenerated at one event."""

    needs = Needs.GRADIENT
    budget_grows = False

    def densities(self, asked: float | Schedule) -> Schedule:
        """A cubic from `start` to a number; a schedule as it is."""
        return falling(self.start, asked, "GraNet")

    def budget(self, views: Sequence[LayerView], total: int) -> dict[str, int] | None:
        """As many as each layer has among the `total` of highest score."""
        return kept_by_score(self, views, total)

    @classmethod
    def paper(cls, *, start: float = 0.5, interval: int = 1000, end: int | None = None) -> Self:
        """The authors' way: dropped units may return at once, and all layers regenerate together."""
        return cls(start=start, interval=interval, end=end, may_return=True, stagger=False)
