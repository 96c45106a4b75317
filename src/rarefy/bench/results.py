"""What a bench found: medians with quartiles, ratios of times taken in the same round, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from rarefy.settings import to_plain


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Self:
        """Of at least one figure; quartiles interpolate between figures."""
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        q1, median, q3 = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, q1, q3)

    @classmethod
    def of_ratio(cls, above: Iterable[float], below: Iterable[float]) -> Self:
        """Of the ratio in each round, so that what slowed a round slows both of its terms."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender on one layer. Times in milliseconds; None where a contender has no such part."""

    shape: tuple[int, int]
    """(out_features, in_features)."""

    contender: str
    """dense, rarefy, or a peer's name and version."""

    kernels: str
    """What computed: an instruction set, "tiled" (plain torch), or the name of the library."""

    density: float
    """Share of the weights that exist, as realised."""

    block: tuple[int, int]
    rounds: int
    forward_ms: Spread | None = None
    dx_ms: Spread | None = None
    """Gradient of the input, called alone."""

    dw_ms: Spread | None = None
    """Gradient of the weights, called alone."""

    total_ms: Spread | None = None
    """Forward and backward through autograd, as in a training step: both gradients, the bias, packing, allocation."""

    dense_ms: Spread | None = None
    """What it is compared with, timed in the same rounds: dense total_ms, or dense forward_ms for a forward alone."""

    speedup: Spread | None = None
    """Dense over sparse time, round by round."""

    forward_only: bool = False
    """Whether `speedup` is of the forward alone, because the contender has no backward of its own."""

    growth_ms: Spread | None = None
    """The best absent units by gradient, 30% as many as exist; timed at the middle one of the densities."""

    growth_ratio: Spread | None = None
    """growth_ms over the dense weight gradient, round by round."""

    @property
    def efficiency(self) -> float | None:
        """Dense time x density / sparse time: 1 where the sparse kernel spends on a weight what the dense one does."""
        return None if self.speedup is None else self.speedup.median * self.density

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `efficiency` included."""
        return {**to_plain(self), "efficiency": self.efficiency}


@dataclass(frozen=True)
class BreakEven:
    """Where sparse stops winning on a layer, as far as the densities that were measured can tell."""

    shape: tuple[int, int]
    block: tuple[int, int]
    density: float | None
    """Estimate: where the sparse time, interpolated between two measured densities, equals the dense time."""

    faster_at: float | None
    """Highest measured density up to which sparse was never slower."""

    slower_at: float | None
    """Lowest measured density at which sparse was slower."""


def break_even(shape: tuple[int, int], block: tuple[int, int], points: Iterable[tuple[float, float]]) -> BreakEven:
    """The estimate from measured (density, speed-up) pairs.

    A sparse layer's time is close to a constant plus a slope times the density, so the time in units of the dense time,
    1 / speed-up, is interpolated linearly between the two densities that bracket 1. Nothing is extrapolated.
    """
    faster: tuple[float, float] | None = None
    for density, speedup in sorted(points):
        if speedup < 1:
            if faster is None:
                return BreakEven(shape, block, None, None, density)
            low, high = 1 / faster[1], 1 / speedup
            estimate = faster[0] + (density - faster[0]) * (1 - low) / (high - low)
            return BreakEven(shape, block, estimate, faster[0], density)
        faster = (density, speedup)
    return BreakEven(shape, block, None, None if faster is None else faster[0], None)


DISTURBED = 0.10
"""A dense reference that moved more than this between start and end makes the figures in between doubtful."""


@dataclass(frozen=True)
class Check:
    """The same dense product timed before everything and after everything: did the machine hold still?"""

    first_ms: float
    last_ms: float

    @property
    def moved(self) -> float:
        """How much slower the slower of the two was; 0.1 is 10%."""
        return max(self.last_ms / self.first_ms, self.first_ms / self.last_ms) - 1

    @property
    def disturbed(self) -> bool:
        return self.moved > DISTURBED


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole bench."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    check: Check
    seconds: float
    """How long it took."""

    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def break_evens(self) -> list[BreakEven]:
        """One for each shape and block, of our own rows."""
        points: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[float, float]]] = {}
        for row in self.rows:
            if row.contender == "rarefy" and row.speedup is not None:
                points.setdefault((row.shape, row.block), []).append((row.density, row.speedup.median))
        return [break_even(shape, block, found) for (shape, block), found in points.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file or a pipe."""
        check = {**to_plain(self.check), "moved": self.check.moved, "disturbed": self.check.disturbed}
        return {
            "machine": self.machine,
            "settings": self.settings,
            "check": check,
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
            "break_even": [to_plain(found) for found in self.break_evens],
            "notes": self.notes,
        }
