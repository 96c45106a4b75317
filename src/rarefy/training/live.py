"""How a run goes, while it goes: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rarefy.training.twin import StepResult, Twin

PLAIN_EVERY_S = 5.0
REFRESH_PER_S = 4
SMOOTHING = 0.9
"""Of the training loss and the pace that are shown."""
WIDE = 118
"""Columns from which the other twin's figures fit into the line."""


class LiveLine:
    """Prints as the run goes.

    Args:
        console: where to; on a terminal the line is redrawn in place.
        plain_every_s: seconds between two lines elsewhere.
    """

    def __init__(self, console: Console, *, plain_every_s: float = PLAIN_EVERY_S) -> None:
        self.console = console
        self._plain_every_s = plain_every_s
        self._live: Live | None = None
        self._twins: list[Twin] = []
        self._steps = self._tokens_per_step = self._taken = 0
        self._begun = self._printed = 0.0
        self._loss: dict[str, float] = {}
        self._step_s: dict[str, float] = {}
        self._train_s: dict[str, float] = {}
        self._valid: dict[str, float] = {}
        self._churn = 0.0

    def say(self, line: str) -> None:
        """A line of its own."""
        self.console.print(Text(line), soft_wrap=True)

    def begin(self, twins: list[Twin], steps: int, tokens_per_step: int) -> None:
        """Training begins; the first of the twins is the one that the line is about."""
        self._twins, self._steps, self._tokens_per_step = twins, steps, tokens_per_step
        self._train_s = {twin.name: twin.clock.train_s for twin in twins}
        self._begun = self._printed = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=REFRESH_PER_S, transient=True)
            self._live.start()

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step of every twin."""
        name, train_s = twin.name, twin.clock.train_s
        self._taken += 1
        self._loss[name] = _smooth(self._loss.get(name), result.loss)
        self._step_s[name] = _smooth(self._step_s.get(name), train_s - self._train_s[name])
        self._train_s[name] = train_s
        if result.rewires:
            self._churn = result.churn
        if self._live is not None:
            self._live.update(Text(self.line(), no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._printed >= self._plain_every_s:
            self._print()

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation of every twin."""
        self._valid[twin.name] = loss / math.log(2)

    def end(self) -> None:
        """The last state stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._taken:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        self.console.print(Text(self.line()), soft_wrap=True)

    def line(self) -> str:
        """Step, loss, bits per byte (of the last evaluation, if any), tokens/s, density, churn, time left."""
        twin, *others = [twin for twin in self._twins if twin.name in self._loss]
        wide = not self.console.is_terminal or self.console.width >= WIDE

        def beside(value: Any) -> str:
            return "".join(f" ({other.name} {value(other.name)})" for other in others) if wide else ""

        def loss(name: str) -> str:
            return f"{self._loss[name]:.3f}"

        def bits(name: str) -> str:
            return f"{self._valid.get(name, self._loss[name] / math.log(2)):.3f}"

        def pace(name: str) -> str:
            return f"{self._tokens_per_step / self._step_s[name]:,.0f}"

        parts = [
            f"step {twin.step:,}/{self._steps:,}",
            f"loss {loss(twin.name)}{beside(loss)}",
            f"{bits(twin.name)} bits/byte{beside(bits)}",
            f"{pace(twin.name)} tokens/s{beside(pace)}",
            f"density {twin.density:.3g}",
            f"churn {self._churn:.2f}",
            f"{self._left()} left",
        ]
        return " · ".join(parts)

    def _left(self) -> str:
        left = sum(self._steps - twin.step for twin in self._twins)
        seconds = (time.monotonic() - self._begun) / self._taken * left
        return (
            f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
            if seconds >= 3600
            else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        )


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else SMOOTHING * before + (1 - SMOOTHING) * now
