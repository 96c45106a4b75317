"""Guard rails: what can go wrong while a pattern is found, each with a name, a condition, and what to change.

A guard is asked at one or more moments: when the length of the run is known, of every layer at the start and after each
of its rewires, of every neuron between two layers, of the loss. It answers with a message or None. `Watch` asks them
all and keeps what they said, once a guard and layer. Thresholds are fields: a guard of other thresholds is one line.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.methods import Method
from rarefy.pattern import Pattern
from rarefy.selection import num_to_replace

BEFORE = 20
"""Losses before a rewire that those after it are held against."""

REMEMBERED = 3
"""Rewires of a layer over which the survival of newborns is taken together."""


class GuardWarning(UserWarning):
    """What a guard has to say; see `Rewirer.warnings`."""


@dataclass(frozen=True)
class RunView:
    """What a guard sees of a run before its first step."""

    method: Method
    end: int
    """Last step after which a layer may rewire."""
    total_steps: int | None
    sizes: Sequence[tuple[int, int]]
    """(K, n) of each layer."""


@dataclass(frozen=True)
class PatternView:
    """What a guard sees of a layer, at the start and after each of its rewires."""

    method: Method
    pattern: Pattern
    rms: float
    """Root mean square of the values."""
    first_units: int
    """K at the start."""
    first_rms: float
    """`rms` at the start."""
    newborns: Sequence[tuple[int, float]] = ()
    """Of the last rewires whose newborns have met one more: how many there were, and the share that was left."""


@dataclass(frozen=True)
class NeuronView:
    """What a guard sees of the hidden neurons of an MLP."""

    method: Method
    up: Pattern
    """Its rows are the neurons' inputs."""
    down: Pattern
    """Its columns are the neurons' outputs."""


@dataclass(frozen=True)
class LossView:
    """What a guard sees of the training loss around a rewire."""

    before: Sequence[float]
    """Of the last steps before the rewire, the one of the rewire included."""
    after: Sequence[float]
    """Of the steps after it, so far."""


class Guard:
    """Answers with a message, which has the figures and what to change, or None."""

    name: ClassVar[str]

    def of_run(self, run: RunView) -> str | None:
        """At `attach`, when the number of steps is known."""
        return None

    def of_pattern(self, seen: PatternView) -> str | None:
        """Of each layer, at `attach` and after each of its rewires."""
        return None

    def of_neurons(self, seen: NeuronView) -> str | None:
        """Of each MLP, at `attach` and after each rewire of one of its layers."""
        return None

    def of_losses(self, seen: LossView) -> str | None:
        """After each of the steps that follow a rewire."""
        return None


# -- of the run -------------------------------------------------------------------------------------------------------


def expected_tried(method: Method, end: int, num_units: int, num_all: int) -> float:
    """Share of the units absent at the start that are active at some time until `end`, if growth were uniform.

    A rewire that grows k of n - K absent units tries a share k / (n - K) of those never tried. Exploration R_s of ITOP
    (Liu et al. 2021, arXiv:2102.02887, section 3) is then density + (1 - density) * this. Growth by gradient comes
    back to the same units more often, so there this is about the most.
    """
    if not method.rewires or num_units >= num_all:
        return 1.0
    untried, span = 1.0, max(end - method.begin, 1)
    for t in range(method.begin or method.interval, end + 1, method.interval):
        fraction = min(
            max(method.fraction((t - method.begin) / span), 0.0), 1.0
        )  # a wrong one is the engine's to refuse
        k = num_to_replace(fraction, num_units, num_all)
        untried *= 1 - k / (num_all - num_units)
    return 1 - untried


@dataclass(frozen=True)
class Exploration(Guard):
    """Too few of the absent units will ever be tried in the steps that there are."""

    name: ClassVar[str] = "exploration"
    least: float = 0.1
    """Share of the absent units to be tried; below it a run is hardly more than a static pattern."""

    def of_run(self, run: RunView) -> str | None:
        if not run.method.rewires:
            return None
        tried = self._tried(run)
        if tried >= self.least:
            return None
        units, everything = (sum(column) for column in zip(*run.sizes, strict=True))
        explored = units / everything + (1 - units / everything) * tried
        factor = math.log1p(-self.least) / math.log1p(-tried) if tried > 0 else math.inf
        steps = "" if run.total_steps is None else f" of {run.total_steps:,} steps"
        return (
            f"rewiring every {run.method.interval} steps until step {run.end:,}{steps} will try at most about "
            f"{tried:.1%} of the units that are absent at the start (exploration R_s {explored:.3f} at a density of "
            f"{units / everything:.3g}): {self._advice(run, factor)}"
        )

    def _tried(self, run: RunView, interval: int | None = None) -> float:
        """Over all layers together."""
        method = run.method if interval is None else dataclasses.replace(run.method, interval=interval)
        by_size = {size: expected_tried(method, run.end, *size) for size in set(run.sizes)}
        absent = sum(n - k for k, n in run.sizes)
        return sum((n - k) * by_size[k, n] for k, n in run.sizes) / absent if absent else 1.0

    def _advice(self, run: RunView, factor: float) -> str:
        """The longest interval that is enough; else how much larger the fraction, or longer the run, would have to be.

        What is tried grows with the number of rewires times their fraction, which gives a first guess.
        """
        interval = min(run.method.interval - 1, int(run.method.interval / factor)) if factor < math.inf else 0
        while interval >= 1 and self._tried(run, interval) < self.least:
            interval -= 1
        longer = (
            ""
            if factor == math.inf
            else f", a fraction {factor:.1f} times as large, or {factor:.1f} times as many steps"
        )
        if interval < 1:
            return "no interval is short enough; " + (
                f"take{longer[1:]}" if longer else "rewire earlier (begin, end) or train for longer"
            )
        return f"use interval={interval} (or shorter){longer}"


@dataclass(frozen=True)
class FrozenEnd(Guard):
    """The last pattern has too few steps to be trained in."""

    name: ClassVar[str] = "frozen end"
    least: float = 0.1
    """Share of the run's steps that should follow the last rewire."""

    def of_run(self, run: RunView) -> str | None:
        if not run.method.rewires or run.total_steps is None:
            return None
        left = max(run.total_steps - run.end, 0)
        if left >= self.least * run.total_steps:
            return None
        return (
            f"rewiring goes on until step {run.end:,} of {run.total_steps:,}, which leaves {left:,} steps with the "
            f"last pattern: set end={int(0.75 * run.total_steps)}, or leave it out, which means 75% of the run"
        )


# -- of a layer -------------------------------------------------------------------------------------------------------


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


# -- of the loss ------------------------------------------------------------------------------------------------------


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


SKIPPED = "skipped rewire"
"""What the engine itself tells of rewires that it left out, as values or scores were not finite (rule 8.3)."""


GUARDS: tuple[Guard, ...] = (
    Exploration(),
    FrozenEnd(),
    DeadRows(),
    DeadColumns(),
    DeadNeurons(),
    Collapse(),
    Newborns(),
    LossSpike(),
)
"""Those that a `Rewirer` has unless told otherwise."""


@dataclass
class _Past:
    """What guards need of a layer's past."""

    first_units: int
    first_rms: float
    born: int = 0
    """Newborns of the last rewire."""
    newborns: tuple[tuple[int, float], ...] = ()


class Watch:
    """Asks the guards and keeps what they say.

    Args:
        guards: whom to ask.
        pairs: (up, down) names of the layers on both sides of hidden neurons.
    Attributes:
        warnings: one record a guard and layer: step, layer ("" for the whole network), guard, message.
    """

    def __init__(self, guards: Sequence[Guard], pairs: Sequence[tuple[str, str]]) -> None:
        self.guards = tuple(guards)
        self.pairs = tuple(pairs)
        self.warnings: list[dict[str, Any]] = []
        self._past: dict[str, _Past] = {}
        self._losses: list[float] = []
        self._rewires: list[tuple[int, list[float], list[float]]] = []
        """Of late: step, losses before, losses after."""

    def attached(self, step: int, run: RunView, layers: Mapping[str, tuple[Pattern, Tensor]]) -> None:
        """The engine has its optimizer: ask about the run, and about every layer as it is."""
        if run.sizes:
            self._ask(step, "", lambda guard: guard.of_run(run))
        for name, (pattern, values) in layers.items():
            self._past.setdefault(name, _Past(pattern.num_units, _rms(values)))
            self._ask_layer(step, name, run.method, pattern, values)
        for up, down in self.pairs:
            if up in layers and down in layers:
                self._ask_neurons(step, up, run.method, layers[up][0], layers[down][0])

    def rewired(
        self,
        step: int,
        name: str,
        method: Method,
        layers: Callable[[str], tuple[Pattern, Tensor]],
        *,
        born: int,
        survival: float | None,
    ) -> None:
        """A layer was rewired.

        Args:
            layers: name -> pattern and values.
            born: units that are new.
            survival: share of the last rewire's newborns that are left; None: there were none.
        """
        pattern, values = layers(name)
        past = self._past.setdefault(name, _Past(pattern.num_units, _rms(values)))
        if survival is not None:
            past.newborns = (*past.newborns, (past.born, survival))[-REMEMBERED:]
        past.born = born
        self._ask_layer(step, name, method, pattern, values)
        for up, down in self.pairs:
            if name in (up, down):
                self._ask_neurons(step, up, method, layers(up)[0], layers(down)[0])
        if self._losses and (not self._rewires or self._rewires[-1][0] != step):
            self._rewires.append((step, self._losses[-BEFORE:], []))

    def observe(self, step: int, loss: float) -> None:
        """The training loss of the step that is about to be applied, `step` having been applied already."""
        if not math.isfinite(loss):
            return
        for at, before, after in self._rewires:
            after.append(loss)
            seen = LossView(before, after)
            self._ask(at, "", lambda guard, seen=seen: guard.of_losses(seen))
        self._rewires = [entry for entry in self._rewires if len(entry[2]) < BEFORE]
        self._losses = [*self._losses, loss][-BEFORE:]

    def tell(self, step: int, layer: str, guard: str, message: str, *, warn: bool = True) -> None:
        """Keep a message, unless this guard has spoken of this layer before; warn of each guard's first."""
        if any(record["guard"] == guard and record["layer"] == layer for record in self.warnings):
            return
        first = all(record["guard"] != guard for record in self.warnings)
        self.warnings.append({"step": step, "layer": layer, "guard": guard, "message": message})
        if first and warn:
            where = f"{layer}: " if layer else ""
            warnings.warn(f"{guard}: {where}{message}", GuardWarning, stacklevel=2)

    def _ask(self, step: int, layer: str, question: Callable[[Guard], str | None]) -> None:
        for guard in self.guards:
            message = question(guard)
            if message is not None:
                self.tell(step, layer, guard.name, message)

    def _ask_layer(self, step: int, name: str, method: Method, pattern: Pattern, values: Tensor) -> None:
        past = self._past[name]
        seen = PatternView(method, pattern, _rms(values), past.first_units, past.first_rms, past.newborns)
        self._ask(step, name, lambda guard: guard.of_pattern(seen))

    def _ask_neurons(self, step: int, name: str, method: Method, up: Pattern, down: Pattern) -> None:
        seen = NeuronView(method, up, down)
        self._ask(step, name, lambda guard: guard.of_neurons(seen))

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data: what was said, and what is needed to say the same after a resume."""
        return {
            "warnings": [dict(record) for record in self.warnings],
            "past": {
                name: {"units": p.first_units, "rms": p.first_rms, "born": p.born, "newborns": _lists(p.newborns)}
                for name, p in self._past.items()
            },
            "losses": list(self._losses),
            "rewires": [[step, list(before), list(after)] for step, before, after in self._rewires],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.warnings = [dict(record) for record in state["warnings"]]
        self._past = {
            name: _Past(p["units"], p["rms"], p["born"], tuple((int(n), float(s)) for n, s in p["newborns"]))
            for name, p in state["past"].items()
        }
        self._losses = list(state["losses"])
        self._rewires = [(int(step), list(before), list(after)) for step, before, after in state["rewires"]]


def _lists(pairs: Sequence[tuple[int, float]]) -> list[list[float]]:
    return [list(pair) for pair in pairs]


def _rms(values: Tensor) -> float:
    """Root mean square; 0 of nothing."""
    return float(values.detach().float().pow(2).mean().sqrt()) if values.numel() else 0.0


def guard_line(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of one guard in a sentence: its name, the first layer and message, and how many other layers."""
    first, others = records[0], len(records) - 1
    where = f"{first['layer']}: " if first.get("layer") else ""
    more = f" (and {others} other layer{'s' if others > 1 else ''})" if others else ""
    return f"{first['guard']}{more}: {where}{first['message']}"
