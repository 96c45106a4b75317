"""How a race goes, while it goes."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from rarefy.cli.live_line import LiveLine
from rarefy.compare.jobs import Job
from rarefy.report import numbers as say
from rarefy.training.twin import StepResult, Twin


class Progress(LiveLine):
    """All runs of a stage on their way together."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._going: set[tuple[str, int]] = set()
        self._taken = self._all = 0

    def begin(self, job: Job, place: int, count: int) -> None:
        """A run is about to go on with the others."""
        if not self._going:
            self._begun, self._taken, self._all = time.monotonic(), 0, 0
        self._going.add((job.label, job.seed))
        self._all += job.steps
        self._open()

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step of any of them."""
        self._taken += 1
        self._loss = result.loss
        self._show(self._line)

    def end(self, job: Job, record: dict[str, Any]) -> None:
        """A run has its record."""
        self._going.discard((job.label, job.seed))
        self._tell_end(job, record)

    def _line(self) -> str:
        return (
            f"{len(self._going)} on their way · {self._taken:,} of {self._all:,} steps · loss {self._loss:.3f} · "
            f"{say.seconds(time.monotonic() - self._begun)} so far"
        )
