"""How a run goes, while it goes: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rarefy.rewiring.guards import guard_line
from rarefy.training.subject import TEXT, Subject
from rarefy.training.twin import StepResult, Twin

PLAIN_EVERY_S = 5.0
REFRESH_PER_S = 4
SMOOTHING = 0.9
"""Of the training loss and the pace that are shown."""


class LiveLine:
    """Prints as the run goes.

    Args:
        console: where to; on a terminal the line is redrawn in place.
        subject: what the run is about.
        plain_every_s: seconds between two lines elsewhere.
    """

    def __init__(self, console: Console, subject: Subject = TEXT, *, plain_every_s: float = PLAIN_EVERY_S) -> None:
        self.console = console
        self._subject = subject
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
        self._warnings = 0
        self._told: set[str] = set()

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
        self._warnings += len(result.guards)
        # Of each kind the first; what follows is counted here and listed at the end.
        for kind in dict.fromkeys(
            str(record["guard"]) for record in result.guards if record["guard"] not in self._told
        ):
            self._told.add(kind)
            self.say("warning: " + guard_line([record for record in result.guards if record["guard"] == kind]))
        if self._live is not None:
            self._live.update(Text(self.line(), no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._printed >= self._plain_every_s and twin.step < self._steps:
            self._print()

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation of every twin."""
        self._valid[twin.name] = self._subject.metric.of({"loss": loss, **twin.assessed})

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
        """Step, loss, the metric (of the last evaluation), pace, density, churn, time left; as much as fits."""
        width = self.console.width if self.console.is_terminal else None
        full, alone, short = (self._line(beside=True), self._line(), self._line(short=True))
        return next((line for line in (full, alone) if width is None or len(line) < width), short)

    def _line(self, *, beside: bool = False, short: bool = False) -> str:
        twin, *others = [twin for twin in self._twins if twin.name in self._loss]

        def each(value: Callable[[str], str]) -> str:
            theirs = "".join(f" ({other.name} {value(other.name)})" for other in others) if beside else ""
            return value(twin.name) + theirs

        metric = self._subject.metric

        def judged(name: str) -> str:
            return metric.show(self._valid[name] if name in self._valid else metric.of({"loss": self._loss[name]}))

        parts = [
            f"{'' if short else 'step '}{twin.step:,}/{self._steps:,}",
            f"loss {each(lambda name: f'{self._loss[name]:.3f}')}",
            f"{each(judged)} {self._subject.short}",
            f"{each(lambda name: f'{self._tokens_per_step / self._step_s[name]:,.0f}')} {self._subject.item}s/s",
            *([] if short else [f"density {twin.density:.3g}"]),
            f"churn {self._churn:.2f}",
            *([f"{self._warnings} warning{'s' if self._warnings > 1 else ''}"] if self._warnings else []),
            f"{self._left()} left",
        ]
        return ("  " if short else " · ").join(parts)

    def _left(self) -> str:
        """By the pace of this process so far, evaluations and checkpoints included."""
        steps = sum(self._steps - twin.step for twin in self._twins)
        minutes, seconds = divmod(int((time.monotonic() - self._begun) / self._taken * steps), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else SMOOTHING * before + (1 - SMOOTHING) * now
