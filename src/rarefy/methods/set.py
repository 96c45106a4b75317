"""Random growth. Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 9:2383, Algorithm 1.

Departs from the paper in three defaults: rewires are counted in steps, not epochs; the units smallest in magnitude go,
where the paper removes the smallest positive and the largest negative ones, which is the same but for the split between
signs; and the fraction follows a cosine, where the paper keeps 0.3: `SET.paper()` restores that and rewires all
layers at once. `SET.itop()` gives the longer interval and larger fraction of Liu et al. 2021 (arXiv:2102.02887,
section 4), and `SET.smet()` the settings of Xiao et al. 2026 (arXiv:2606.00888), whose ages of units and ramp of
newborns are `rarefy.AdamW`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rarefy.methods.base import Method
from rarefy.schedules import Constant, Cosine


@dataclass(frozen=True, kw_only=True)
class SET(Method):
    """Drop the units smallest in magnitude, grow as many at random."""

    @classmethod
    def paper(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """The paper's constant fraction of 0.3, all layers at once."""
        return cls(interval=interval, end=end, fraction=Constant(0.3), stagger=False)

    @classmethod
    def itop(cls, *, interval: int = 1500, end: int | None = None) -> Self:
        """In-time over-parametrisation: explore more, but give newborns the time to grow (Liu et al. 2021).

        The authors' code anneals to 0.005 at the run's last step and never stops: give `end` the run's steps for that.
        """
        return cls(interval=interval, end=end, fraction=Cosine(start=0.5, stop=0.005))

    @classmethod
    def smet(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """For language models with `rarefy.AdamW`: few at a time (Xiao et al. 2026, who use 0.1 to 0.2)."""
        return cls(interval=interval, end=end, fraction=Cosine(start=0.2))
