"""What a bench found: medians with quartiles, ratios of times taken in the same round, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from rarefy.probe import Ceilings
from rarefy.settings import to_plain

DENSE = "dense"


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
    """One contender on one layer or one GPT. Times in milliseconds; None where a contender has no such part."""

    kind: Literal["layer", "gpt", "conv", "cnn"] = "layer"
    shape: tuple[int, int]
    """(out_features, in_features) of a layer, (width, layers) of a GPT, (out, in) channels of a convolution."""

    what: str = ""
    """Of a convolution or a network for images: which one, in words."""

    tokens: int
    """Rows of input; of a GPT, bytes of a step; of a convolution, pixels of its output; of a network, images."""

    contender: str
    """dense, rarefy, or a peer's name and version."""

    dtype: str = "fp32"
    """fp32, medium or bf16: see `rarefy.cost.Precision`; on a GPU fp8 too."""

    compiled: bool = False
    """Whether by torch.compile."""

    kernels: str
    """What computed: an instruction set, "tiled" (plain torch), or the name of the library."""

    density: float
    """Share of the weights that exist, as realised; of a GPT, in its sparse layers."""

    block: tuple[int, int]
    rounds: int
    forward_ms: Spread | None = None
    dx_ms: Spread | None = None
    """Gradient of the input, called alone."""

    dw_ms: Spread | None = None
    """Gradient of the weights, called alone."""

    backward_ms: Spread | None = None
    """Through autograd, after `forward_ms`: both gradients, the bias, packing, allocation."""

    optimizer_ms: Spread | None = None
    """Clipping of the gradient and the optimizer's step, of a GPT."""

    total_ms: Spread | None = None
    """Forward, backward and, of a GPT, optimizer together, round by round."""

    speedup_fp32: Spread | None = None
    """Time of dense fp32, eager, over this one's, round by round; None for that one itself."""

    speedup: Spread | None = None
    """The same against the fastest dense contender of the same rounds, by median; None for that one itself."""

    fastest: str = ""
    """Which one that was: "bf16", "fp32 compiled", ..."""

    dense_ms: Spread | None = None
    """Its time: all of it, or its forward where that alone is compared."""

    forward_only: bool = False
    """Whether speeds are of the forward alone, because the contender has no backward of its own."""

    flops: int = 0
    """Useful ones: 2 x nnz x tokens for each product that is compared, and a GPT's attention."""

    ceiling_gflops: float | None = None
    """The most that the probe reached with the arithmetic that was at this contender's disposal."""

    growth_ms: Spread | None = None
    """The best absent units by gradient, 30% as many as exist; timed at the middle one of the densities."""

    growth_ratio: Spread | None = None
    """growth_ms over the dense fp32 weight gradient, round by round."""

    @property
    def efficiency(self) -> float | None:
        """Dense time x density / sparse time, against the fastest dense: 1 where the sparse kernel spends on a weight
        what the dense one does. None for dense layers, and for whole networks, of which parts are dense.
        """
        if self.speedup is None or self.contender == DENSE or self.kind in ("gpt", "cnn"):
            return None
        return self.speedup.median * self.density

    @property
    def gflops(self) -> float | None:
        """Useful GFLOP/s."""
        compared = self.forward_ms if self.forward_only else self.total_ms
        return self.flops / compared.median / 1e6 if compared is not None and self.flops else None

    @property
    def share(self) -> float | None:
        """`gflops` as a part of the machine's ceiling."""
        return self.gflops / self.ceiling_gflops if self.gflops and self.ceiling_gflops else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        return {**to_plain(self), "efficiency": self.efficiency, "gflops": self.gflops, "share": self.share}


@dataclass(frozen=True)
class Crossing:
    """Where sparse stops winning, as far as the densities that were measured can tell."""

    density: float | None
    """Estimate: where the sparse time, interpolated between two measured densities, equals the dense time."""

    faster_at: float | None
    """Highest measured density up to which sparse was never slower."""

    slower_at: float | None
    """Lowest measured density at which sparse was slower."""


def break_even(points: Iterable[tuple[float, float]]) -> Crossing:
    """The estimate from measured (density, speed-up) pairs.

    A sparse layer's time is close to a constant plus a slope times the density, so the time in units of the dense time,
    1 / speed-up, is interpolated linearly between the two densities that bracket 1. Nothing is extrapolated.
    """
    faster: tuple[float, float] | None = None
    for density, speedup in sorted(points):
        if speedup < 1:
            if faster is None:
                return Crossing(None, None, density)
            low, high = 1 / faster[1], 1 / speedup
            estimate = faster[0] + (density - faster[0]) * (1 - low) / (high - low)
            return Crossing(estimate, faster[0], density)
        faster = (density, speedup)
    return Crossing(None, None if faster is None else faster[0], None)


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """The crossing of one layer, block and dtype, against dense fp32 and against the fastest dense."""

    shape: tuple[int, int]
    tokens: int
    block: tuple[int, int]
    dtype: str
    against_fp32: Crossing
    against_fastest: Crossing


DISTURBED = 0.10
"""A figure that moved more than this between start and end makes those in between doubtful."""


@dataclass(frozen=True)
class Check:
    """The same dense product and the same probe before everything and after everything: did the machine hold still?"""

    first_ms: float
    last_ms: float
    first: Ceilings = field(default_factory=Ceilings)
    last: Ceilings = field(default_factory=Ceilings)

    def readings(self) -> dict[str, tuple[float, float]]:
        """Name -> what was read first and last: milliseconds of the dense reference, GFLOP/s and GB/s of the probe."""
        last = self.last.readings()
        both = {name: (rate, last[name]) for name, rate in self.first.readings().items() if name in last}
        return {"dense reference": (self.first_ms, self.last_ms), **both}

    @property
    def worst(self) -> str:
        """The name of what moved most. Main memory is shown and not judged: its bandwidth depends on which pages the
        system handed out, and on the neighbours of a virtual machine, while layers work out of the caches.
        """
        judged = [name for name in self.readings() if not name.startswith("memory")]
        return max(judged, key=lambda name: _moved(*self.readings()[name]))

    @property
    def moved(self) -> float:
        """How much: 0.1 is 10%."""
        return _moved(*self.readings()[self.worst])

    @property
    def disturbed(self) -> bool:
        return self.moved > DISTURBED

    def peak(self, dtype: str, isa: str, *, tiles: bool = False) -> float | None:
        """The higher of the two ceilings: see `rarefy.probe.Ceilings.peak`."""
        both = [reading.peak(dtype, isa, tiles=tiles) for reading in (self.first, self.last)]
        return max((peak for peak in both if peak is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        readings = {name: {"first": first, "last": last} for name, (first, last) in self.readings().items()}
        return {"readings": readings, "worst": self.worst, "moved": self.moved, "disturbed": self.disturbed}


def _moved(first: float, last: float) -> float:
    return max(last / first, first / last) - 1


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
        """One for each layer, token count, block and dtype, of our own rows."""
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if row.kind == "layer" and row.contender == "rarefy":
                found.setdefault((row.shape, row.tokens, row.block, row.dtype), []).append(row)
        return [
            BreakEven(
                shape=shape,
                tokens=tokens,
                block=block,
                dtype=dtype,
                against_fp32=break_even((r.density, r.speedup_fp32.median) for r in rows if r.speedup_fp32),
                against_fastest=break_even((r.density, r.speedup.median) for r in rows if r.speedup),
            )
            for (shape, tokens, block, dtype), rows in found.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file or a pipe."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "check": self.check.to_dict(),
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
            "break_even": [to_plain(found) for found in self.break_evens],
            "notes": self.notes,
        }
