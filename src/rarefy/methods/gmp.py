"""Gradual magnitude pruning. Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, section 3.

Departs from the authors' code in three ways: what is pruned leaves storage and compute for good, where theirs stays
behind a mask and may come back; all layers share one budget, spread as the plan says (theirs gives each layer its own
target, which is `distribution="uniform"`), or found by one threshold for all layers; and pruning begins at step 0
unless `begin` says when the dense phase ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rarefy.methods.base import LayerView, Method
from rarefy.methods.falling import falling, kept_by_score
from rarefy.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class GMP(Method):
    """The density falls by a cubic to the plan's; the units smallest in magnitude go, and none come."""

    start: float = 1.0
    """Density at `begin`; 1 is dense-to-sparse, as in the paper. The plan's density is the last one."""

    scope: Literal["layer", "global"] = "layer"
    """Whose units compete: "layer", each layer's by the plan's distribution; "global", those of all layers."""

    rewires = False
    budget_grows = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("layer", "global"):
            raise ValueError(f'scope must be "layer" or "global", got {self.scope!r}')

    def densities(self, asked: float | Schedule) -> Schedule:
        """A cubic from `start` to a number; a schedule as it is."""
        return falling(self.start, asked, "GMP")

    def budget(self, views: Sequence[LayerView], total: int) -> dict[str, int] | None:
        """Global: as many as each layer has among the `total` of highest score."""
        return kept_by_score(self, views, total) if self.scope == "global" else super().budget(views, total)
