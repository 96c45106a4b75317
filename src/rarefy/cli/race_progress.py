"""How a race goes, while it goes: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rarefy.compare.jobs import Job
from rarefy.report import numbers as say
from rarefy.training.subject import subject_of
from rarefy.training.twin import StepResult, Twin

PLAIN_EVERY_S = 15.0


class Progress:
    """All runs of a stage on their way together."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._going: set[tuple[str, int]] = set()
        self._loss = math.nan
        self._begun = self._printed = time.monotonic()
        self._taken = self._all = 0

    def say(self, line: str) -> None:
        """A line of its own."""
        self.console.print(Text(line), soft_wrap=True)

    def begin(self, job: Job, place: int, count: int) -> None:
        """A run is about to go on with the others."""
        if not self._going:
            self._begun, self._taken, self._all = time.monotonic(), 0, 0
        self._going.add((job.label, job.seed))
        self._all += job.steps
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step of any of them."""
        self._taken += 1
        self._loss = result.loss
        if self._live is not None:
            self._live.update(Text(self._line(), no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self.say(self._line())

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation."""

    def end(self, job: Job, record: dict[str, Any]) -> None:
        """A run has its record."""
        self._going.discard((job.label, job.seed))
        if record["state"] != "finished":
            self.say(f"{job.label}, seed {job.seed}: {record['state']}: {record['message']}")
            return
        metric = subject_of(record).metric
        figures = f"{metric.show(record['final'])} {metric.title}"
        self.say(f"{job.label}, seed {job.seed}: {figures} in {say.seconds(record['clock']['train_s'])}")

    def stop(self) -> None:
        """Nothing more is to come."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self) -> str:
        return (
            f"{len(self._going)} on their way · {self._taken:,} of {self._all:,} steps · loss {self._loss:.3f} · "
            f"{say.seconds(time.monotonic() - self._begun)} so far"
        )
