"""How a comparison goes, while it goes."""

from __future__ import annotations

import math
import time
from statistics import fmean
from typing import Any

from rich.console import Console

from rarefy.cli.live_line import LiveLine
from rarefy.compare.jobs import Job
from rarefy.report import numbers as say
from rarefy.training.twin import StepResult, Twin


class Progress(LiveLine):
    """One run after the other."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._head = ""
        self._steps = 0
        self._first = self._left = 0
        self._took: list[float] = []

    def begin(self, job: Job, place: int, count: int) -> None:
        """A run begins."""
        self._head, self._steps, self._loss = f"{place} of {count}: {job.label}, seed {job.seed}", job.steps, math.nan
        self._begun, self._first, self._left = time.monotonic(), -1, count - place
        self._open()

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step."""
        if self._first < 0:
            self._first = twin.step - 1
        self._loss = result.loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * result.loss
        self._show(lambda: self._line(twin))

    def end(self, job: Job, record: dict[str, Any]) -> None:
        """A run has its record."""
        self._printed = time.monotonic()
        self._took.append(self._printed - self._begun)
        self._tell_end(job, record)

    def _line(self, twin: Twin) -> str:
        taken = max(1, twin.step - self._first)
        left = (time.monotonic() - self._begun) / taken * (self._steps - twin.step)
        later = f", {say.seconds(left + self._left * fmean(self._took))} of all" if self._took else ""
        return (
            f"{self._head} · step {twin.step:,}/{self._steps:,} · loss {self._loss:.3f} · density {twin.density:.3g} · "
            f"{say.seconds(left)} left of this run{later}"
        )
