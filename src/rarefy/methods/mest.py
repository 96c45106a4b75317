"""Memory-economic sparse training. Yuan et al. 2021, "MEST: Accurate and Fast Memory-Economic Sparse Training Framework
on the Edge", arXiv:2110.14032, section 3.

Elastic mutation (EM): drop the units of least |w| + lambda |gradient of w|, grow as many. With the soft memory bound
(EM&S) the density stays above the plan's by what an update grows, so that newborns train before they compete; the
surplus falls to 0 in steps, and with it what is replaced.

Departs from the authors' code in four ways: the surplus is a share of the layer's density, so that one default serves
every density (theirs is absolute, .02 of all weights at density .1); updates are counted in steps, not every 5 epochs;
layers take turns; and growth is exact in number. The surplus falls at 75% and 100% of the schedule, which ends at 75%
of the run: about the authors' epochs 90 and 120 of 160.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self

from torch import Tensor

from rarefy.methods.base import LayerView, Method, Needs, unit_mean
from rarefy.schedules import Schedule, Steps, as_schedule


@dataclass(frozen=True)
class Surplus(Schedule):
    """`asked` and `share` of it on top, at most 1."""

    asked: Schedule
    """Density without the surplus."""
    share: Schedule
    """Surplus over it."""

    def at(self, progress: float) -> float:
        return min(1.0, self.asked(progress) * (1 + self.share(progress)))


@dataclass(frozen=True, kw_only=True)
class MEST(Method):
    """Drop by magnitude and gradient together: `MEST()` is EM, `MEST(soft=True)` EM&S."""

    fraction: Schedule = field(default_factory=lambda: Steps((0.2, 0.1, 0.0), (0.0, 0.75, 1.0)))
    """What an update replaces, over the units that the plan's density gives."""

    gradient_weight: float = 0.01
    """lambda: what a gradient of 1 counts beside a weight of 1. It must fit the loss's scale."""

    soft: bool = False
    """The soft memory bound: hold the plan's density and `fraction` of it on top between updates."""

    growth: Literal["random", "gradient"] = "random"
    """Grow at random, or where the dense gradient is largest; the paper has both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.growth not in ("random", "gradient"):
            raise ValueError(f'growth must be "random" or "gradient", got {self.growth!r}')
        # Of the instance: what the class says is only where other methods leave it.
        object.__setattr__(self, "needs", Needs.GRADIENT if self.growth == "gradient" else Needs.NOTHING)
        if self.gradient_weight < 0:
            raise ValueError(f"gradient_weight must not be negative, got {self.gradient_weight}")

    def drop_score(self, view: LayerView) -> Tensor:
        """(K,) |w| + lambda |gradient of w|, by unit; the gradient as the optimizer saw it, |w| alone without one."""
        score = unit_mean(view.values.abs())
        if view.gradient is None:
            return score
        return score + self.gradient_weight * unit_mean(view.gradient.abs()).to(score)

    def densities(self, asked: float | Schedule) -> Schedule:
        """The surplus on top of what is asked for, if soft."""
        return Surplus(as_schedule(asked), self.fraction) if self.soft else as_schedule(asked)

    def replaced(self, progress: float) -> float:
        """Soft: the surplus over all that is held, so that an update falls to the plan's density and grows back."""
        share = self.fraction(progress)
        return share / (1 + share) if self.soft else share

    @classmethod
    def em(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """Elastic mutation, all layers at once as in the paper."""
        return cls(interval=interval, end=end, stagger=False)

    @classmethod
    def em_s(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """Elastic mutation under the soft memory bound, all layers at once as in the paper."""
        return cls(interval=interval, end=end, soft=True, stagger=False)
