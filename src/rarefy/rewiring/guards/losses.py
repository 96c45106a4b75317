"""Guards of the training loss around a rewire."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import ClassVar

from rarefy.rewiring.guards.base import Guard, LossView

BEFORE = 20
"""Losses before a rewire that those after it are held against."""


@dataclass(frozen=True)
class LossSpike(Guard):
    """The loss jumps after a rewire, by more than its own noise."""

    name: ClassVar[str] = "loss spike"
    after: int = 3
    """Steps after a rewire that are averaged."""
    rise: float = 0.05
    """Least relative rise that counts."""
    deviations: float = 3.0
    """And the least in standard deviations of the losses before, of which a mean of `after` has a root less."""

    def of_losses(self, seen: LossView) -> str | None:
        if len(seen.after) != self.after or len(seen.before) < BEFORE:
            return None
        before, after = fmean(seen.before), fmean(seen.after)
        noise = self.deviations * pstdev(seen.before) / math.sqrt(self.after)
        if after <= before + max(self.rise * abs(before), noise):
            return None
        return (
            f"the loss rose to {after:.4g} over the {self.after} steps after a rewire, from {before:.4g} over the "
            f"{BEFORE} before: use a lower fraction, rarefy.AdamW (it ramps newborns up), stagger=True, or a lower rate"
        )
