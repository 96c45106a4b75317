"""A contender is its laps and what is to be said about it; its times become a row of results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rarefy.bench.results import DENSE, Row, Spread
from rarefy.cost import Lap, interleaved

Times = dict[str, list[float]]
"""Milliseconds of each lap, by name, in every round."""

FUSED_NORMS = "torch, fused norms"
"""Kernels of a dense network for images with our batch norms."""

Kind = Literal["layer", "gpt", "conv", "cnn"]

COUNTED = ("forward", "backward", "optimizer")
"""Laps that make up a contender's time. Others are shown by themselves, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to be timed in every round."""

    name: str
    """dense, rarefy, or a peer's name and version."""

    laps: Mapping[str, Lap]
    """By name, in the order in which they run: those of COUNTED, of which "forward" comes first and is never missing;
    dx, dw, growth; and whatever else has to happen and is not shown."""

    flops: int
    """Useful ones of the counted laps."""

    kernels: str
    dtype: str = "fp32"
    compiled: bool = False
    density: float = 1.0
    block: tuple[int, int] = (1, 1)

    @property
    def forward_only(self) -> bool:
        """Whether it has no backward."""
        return "backward" not in self.laps

    @property
    def label(self) -> str:
        """What tells a dense contender from another."""
        more = (" compiled" if self.compiled else "") + (" fused norms" if self.kernels == FUSED_NORMS else "")
        return self.dtype + more


def time_in_turn(contenders: Sequence[Contender], *, budget_s: float, rounds: int) -> list[Times]:
    """Every lap of every contender in every round; see `rarefy.cost.interleaved`."""
    found = interleaved([list(c.laps.values()) for c in contenders], budget_s=budget_s, rounds=rounds)
    return [dict(zip(c.laps, times, strict=True)) for c, times in zip(contenders, found, strict=True)]


def rows(
    kind: Kind,
    shape: tuple[int, int],
    tokens: int,
    contenders: Sequence[Contender],
    times: Sequence[Times],
    what: str = "",
) -> list[Row]:
    """A row for each, compared with the dense contenders among them: eager fp32, which comes first, and the fastest."""
    dense = [(c, t) for c, t in zip(contenders, times, strict=True) if c.name == DENSE]
    return [_row(kind, shape, tokens, what, c, t, dense) for c, t in zip(contenders, times, strict=True)]


def _row(
    kind: Kind,
    shape: tuple[int, int],
    tokens: int,
    what: str,
    contender: Contender,
    times: Times,
    dense: Sequence[tuple[Contender, Times]],
) -> Row:
    counted = ("forward",) if contender.forward_only else COUNTED
    mine = _sum(times, counted)
    rivals = [(rival, _sum(theirs, counted)) for rival, theirs in dense]
    (fp32, fp32_times), (fastest, fastest_times) = rivals[0], min(rivals, key=lambda one: statistics.median(one[1]))

    def spread(name: str) -> Spread | None:
        return Spread.of(times[name]) if name in times else None

    growth = times.get("growth")
    return Row(
        kind=kind,
        shape=shape,
        tokens=tokens,
        what=what,
        contender=contender.name,
        dtype=contender.dtype,
        compiled=contender.compiled,
        kernels=contender.kernels,
        density=contender.density,
        block=contender.block,
        rounds=len(mine),
        forward_ms=spread("forward"),
        dx_ms=spread("dx"),
        dw_ms=spread("dw"),
        backward_ms=spread("backward"),
        optimizer_ms=spread("optimizer"),
        total_ms=None if contender.forward_only else Spread.of(mine),
        speedup_fp32=None if contender is fp32 else Spread.of_ratio(fp32_times, mine),
        speedup=None if contender is fastest else Spread.of_ratio(fastest_times, mine),
        fastest=fastest.label,
        dense_ms=Spread.of(fastest_times),
        forward_only=contender.forward_only,
        flops=contender.flops,
        growth_ms=spread("growth"),
        growth_ratio=Spread.of_ratio(growth, dense[0][1]["dw"]) if growth is not None else None,
    )


def _sum(times: Times, names: Sequence[str]) -> list[float]:
    return [sum(parts) for parts in zip(*(times[name] for name in names if name in times), strict=True)]
