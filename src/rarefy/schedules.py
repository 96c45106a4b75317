"""Schedules: functions of progress in [0, 1], never of steps or clocks (rewiring rule 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass


class Schedule:
    """A value for every progress in [0, 1]."""

    def __call__(self, progress: float) -> float:
        """The value at `progress`, which is clipped to [0, 1] first."""
        return self.at(min(max(progress, 0.0), 1.0))

    def at(self, progress: float) -> float:
        """The value at a progress known to lie in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must define at(progress)")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout."""

    value: float
    """The value."""

    def at(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from `start` to `stop`."""

    start: float
    """Value at progress 0."""
    stop: float = 0.0
    """Value at progress 1."""

    def at(self, progress: float) -> float:
        return self.start + (self.stop - self.start) * progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from `start` to `stop` (Dettmers & Zettlemoyer 2019; Evci et al. 2020, section 3)."""

    start: float
    """Value at progress 0."""
    stop: float = 0.0
    """Value at progress 1."""

    def at(self, progress: float) -> float:
        return self.stop + (self.start - self.stop) * (1 + math.cos(math.pi * progress)) / 2
