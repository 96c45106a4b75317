"""Asks the guards at their moments, keeps what they said, and says it again after a resume."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.methods import Method
from rarefy.pattern import Pattern
from rarefy.rewiring.guards.base import Guard, LossView, NeuronView, PatternView, RunView
from rarefy.rewiring.guards.layers import REMEMBERED
from rarefy.rewiring.guards.losses import BEFORE


class GuardWarning(UserWarning):
    """What a guard has to say; see `Rewirer.warnings`."""


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
