"""Gradient growth. Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134, Algorithm 1.

Departs from the authors' code in three defaults: just-dropped units may not return in the same rewire, layers
take turns instead of rewiring all at once, and that step's weight update is applied. `RigL.paper()` restores the
first two. `RigL.itop()` gives the longer interval and larger fraction of Liu et al. 2021 (arXiv:2102.02887, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rarefy.growth import Exact
from rarefy.methods.base import Method, Needs
from rarefy.schedules import Cosine


@dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """Drop the units smallest in magnitude, grow where the dense gradient is largest: both scores are the defaults."""

    needs = Needs.GRADIENT

    @classmethod
    def paper(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """The authors' way: the exact gradient, dropped units may return at once, and all layers rewire together."""
        return cls(interval=interval, end=end, may_return=True, stagger=False, signal=Exact())

    @classmethod
    def itop(cls, *, interval: int = 4000, end: int | None = None) -> Self:
        """In-time over-parametrisation: explore more, but give newborns the time to grow (Liu et al. 2021).

        The authors' code anneals to 0.005 at the run's last step and never stops: give `end` the run's steps for that.
        """
        return cls(interval=interval, end=end, fraction=Cosine(start=0.5, stop=0.005))
