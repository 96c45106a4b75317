"""How a comparison goes, while it goes: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import time
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rarefy.compare.jobs import Job
from rarefy.report import numbers as say
from rarefy.training.twin import StepResult, Twin

PLAIN_EVERY_S = 15.0


class Progress:
    """Prints as the runs go."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._head = ""
        self._steps = 0
        self._loss = math.nan
        self._begun = self._printed = time.monotonic()
        self._first = self._left = 0
        self._took: list[float] = []

    def say(self, line: str) -> None:
        """A line of its own."""
        self.console.print(Text(line), soft_wrap=True)

    def begin(self, job: Job, place: int, count: int) -> None:
        """A run begins."""
        self._head, self._steps, self._loss = f"{place} of {count}: {job.label}, seed {job.seed}", job.steps, math.nan
        self._begun, self._first, self._left = time.monotonic(), -1, count - place
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step."""
        if self._first < 0:
            self._first = twin.step - 1
        self._loss = result.loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * result.loss
        if self._live is not None:
            self._live.update(Text(self._line(twin), no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self.say(self._line(twin))

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation."""

    def end(self, job: Job, record: dict[str, Any]) -> None:
        """A run has its record."""
        self._printed = time.monotonic()
        self._took.append(self._printed - self._begun)
        if record["state"] != "finished":
            self.say(f"{job.label}, seed {job.seed}: {record['state']}: {record['message']}")
            return
        figures = f"{record['metric'].replace('_', ' ')} {record['final']:.4f}"
        self.say(f"{job.label}, seed {job.seed}: {figures} in {say.seconds(record['clock']['train_s'])}")

    def stop(self) -> None:
        """Nothing more is to come."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, twin: Twin) -> str:
        taken = max(1, twin.step - self._first)
        left = (time.monotonic() - self._begun) / taken * (self._steps - twin.step)
        later = f", {say.seconds(left + self._left * fmean(self._took))} of all" if self._took else ""
        return (
            f"{self._head} · step {twin.step:,}/{self._steps:,} · loss {self._loss:.3f} · density {twin.density:.3g} · "
            f"{say.seconds(left)} left of this run{later}"
        )
