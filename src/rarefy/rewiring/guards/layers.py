"""Guards of a layer's pattern and values, and of the neurons between two layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.pattern import Pattern
from rarefy.rewiring.guards.base import Guard, NeuronView, PatternView

REMEMBERED = 3
"""Rewires of a layer over which the survival of newborns is taken together."""


def _empty_rows(pattern: Pattern) -> Tensor:
    """(R,) whether a unit row has no unit."""
    return torch.diff(pattern.crow_indices.cpu()) == 0


def _empty_cols(pattern: Pattern) -> Tensor:
    """(C,) whether a unit column has no unit."""
    empty = torch.ones(pattern.num_unit_cols, dtype=torch.bool)
    empty[pattern.col_indices.long().cpu()] = False
    return empty


@dataclass(frozen=True)
class DeadRows(Guard):
    """Unit rows without a unit: their outputs are constant."""

    name: ClassVar[str] = "dead rows"
    share: float = 0.01
    """Of the rows that may be empty."""

    def of_pattern(self, seen: PatternView) -> str | None:
        empty, rows = int(_empty_rows(seen.pattern).sum()), seen.pattern.num_unit_rows
        if seen.method.expects_empty_rows or empty <= self.share * rows:
            return None
        return (
            f"{empty} of {rows} unit rows have no unit, so their outputs are the bias, whatever the input: give the "
            "layer a higher density (overrides=), a smaller block, or a lower fraction"
        )


@dataclass(frozen=True)
class DeadColumns(Guard):
    """Unit columns without a unit: no one reads these inputs."""

    name: ClassVar[str] = "dead columns"
    share: float = 0.01
    """Of the columns that may be empty."""

    def of_pattern(self, seen: PatternView) -> str | None:
        empty, cols = int(_empty_cols(seen.pattern).sum()), seen.pattern.num_unit_cols
        if empty <= self.share * cols:
            return None
        return (
            f"{empty} of {cols} unit columns have no unit, so these inputs are not read: give the layer a higher "
            "density (overrides=), a smaller block, or a first pattern with init='balanced'"
        )


@dataclass(frozen=True)
class DeadNeurons(Guard):
    """Hidden neurons that nothing goes into, or nothing comes out of: parameters and time without effect."""

    name: ClassVar[str] = "dead neurons"
    share: float = 0.01
    """Of the neurons that may be dead."""

    def of_neurons(self, seen: NeuronView) -> str | None:
        if seen.method.expects_empty_rows:
            return None
        blind = _empty_rows(seen.up).repeat_interleave(seen.up.block[0])
        mute = _empty_cols(seen.down).repeat_interleave(seen.down.block[1])
        dead, neurons = int((blind | mute).sum()), blind.numel()
        if dead <= self.share * neurons:
            return None
        return (
            f"{dead} of {neurons} hidden neurons are dead ({int(blind.sum())} read nothing, {int(mute.sum())} are read "
            "by nothing): use fewer of them at a higher density, smaller blocks, or init='balanced'"
        )


@dataclass(frozen=True)
class Collapse(Guard):
    """A layer that carries next to nothing any more: few units, values near zero, or all units in few rows."""

    name: ClassVar[str] = "layer collapse"
    rank: float = 0.1
    """A layer that shrank to fewer units than this share of its shorter side collapsed: they bound its rank."""
    rms: float = 1e-3
    """Share of their first root mean square below which values count as zero."""
    crowded: tuple[float, float] = (0.9, 0.1)
    """More than the first share of the units in the fullest second share of the rows."""

    def of_pattern(self, seen: PatternView) -> str | None:
        pattern = seen.pattern
        units, short = pattern.num_units, min(pattern.num_unit_rows, pattern.num_unit_cols)
        if units < seen.first_units and units < max(1.0, self.rank * short):
            return (
                f"{units} units are left of {seen.first_units}, in a matrix of {pattern.num_unit_rows} by "
                f"{pattern.num_unit_cols}: keep the layer dense (keep_dense=), give it a density of its own "
                "(overrides=), or let the density move within layers instead of between them"
            )
        if seen.rms < self.rms * seen.first_rms:
            return (
                f"its values fell to a root mean square of {seen.rms:.1e}, from {seen.first_rms:.1e} at the start, so "
                "the layer says next to nothing: use less weight decay, a lower rate, or a longer interval, in which "
                "newborns (which begin at zero) grow"
            )
        rows = math.ceil(self.crowded[1] * pattern.num_unit_rows)
        counts = torch.sort(torch.diff(pattern.crow_indices.cpu()), descending=True).values
        held = int(counts[:rows].sum())
        # With a unit a row or less, few rows hold them all without anything being wrong.
        if units > pattern.num_unit_rows >= 10 and held > self.crowded[0] * units:
            return (
                f"{held / units:.0%} of the units are in {rows} of {pattern.num_unit_rows} rows: the others hardly "
                "count; use Plan(balance=...) to keep units per group of rows, a lower fraction, or random growth (SET)"
            )
        return None


@dataclass(frozen=True)
class Newborns(Guard):
    """Units that were grown are gone at the next rewire: the interval gives them no time."""

    name: ClassVar[str] = "newborn survival"
    least: float = 0.1
    """Share of the newborns of the last rewires that should see the one after the next."""
    enough: int = 20
    """Newborns to judge by."""

    def of_pattern(self, seen: PatternView) -> str | None:
        born = sum(count for count, _ in seen.newborns)
        if len(seen.newborns) < REMEMBERED or born < self.enough:
            return None
        survival = sum(count * share for count, share in seen.newborns) / born
        if survival >= self.least:
            return None
        return (
            f"of the last {born:,} newborns {survival:.1%} were left at the layer's next rewire, "
            f"{seen.method.interval} steps later: use a longer interval, a higher rate for the values, or a shorter "
            "ramp (rarefy.AdamW(ramp=...), 100 steps unless given), so that they grow large enough to stay"
        )
