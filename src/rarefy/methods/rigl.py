"""Gradient growth. Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134, Algorithm 1.

Departs from the authors' code in three defaults: just-dropped units may not return in the same rewire, layers
take turns instead of rewiring all at once, and that step's weight update is applied. `RigL.paper()` restores the
first two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rarefy.growth import Exact
from rarefy.methods.base import Method, Needs


@dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """Drop the units smallest in magnitude, grow where the dense gradient is largest: both scores are the defaults."""

    needs = Needs.GRADIENT

    @classmethod
    def paper(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """The authors' way: the exact gradient, dropped units may return at once, and all layers rewire together."""
        return cls(interval=interval, end=end, may_return=True, stagger=False, signal=Exact())
