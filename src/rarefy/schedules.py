"""Schedules: functions of progress in [0, 1], never of steps or clocks (rewiring rule 4.3)."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise


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


@dataclass(frozen=True)
class Cubic(Schedule):
    """From `start` to `stop`, fast at first: the gap shrinks as (1 - progress)^3 (Zhu & Gupta 2017, section 3)."""

    start: float
    """Value at progress 0."""
    stop: float = 0.0
    """Value at progress 1."""

    def at(self, progress: float) -> float:
        return self.stop + (self.start - self.stop) * (1 - progress) ** 3


@dataclass(frozen=True)
class Steps(Schedule):
    """A staircase: values[i] from progress begins[i] on.

    Raises:
        ValueError: the lists are of different length, or `begins` does not rise from 0 to at most 1.
    """

    values: tuple[float, ...]
    """One a stair."""
    begins: tuple[float, ...]
    """Progress at which each stair begins; the first is 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "begins", tuple(self.begins))
        rises = all(low < high for low, high in pairwise(self.begins))
        if not self.begins or len(self.begins) != len(self.values) or self.begins[0] != 0 or not rises:
            raise ValueError(
                f"Steps needs as many begins as values, rising from 0, got {self.begins} for {self.values}"
            )
        if self.begins[-1] > 1:
            raise ValueError(f"Steps: progress ends at 1, and a stair begins at {self.begins[-1]}")

    def at(self, progress: float) -> float:
        return self.values[bisect_right(self.begins, progress) - 1]


def as_schedule(value: float | Schedule) -> Schedule:
    """A number as the schedule that stays there; a schedule as it is."""
    return value if isinstance(value, Schedule) else Constant(value)
