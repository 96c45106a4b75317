"""One line about many runs, while they go: live on a terminal, printed now and then elsewhere."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rarefy.compare.jobs import Job
from rarefy.report import numbers as say
from rarefy.training.interrupt import Interrupted
from rarefy.training.subject import subject_of
from rarefy.training.twin import Twin

PLAIN_EVERY_S = 15.0


class LiveLine:
    """What progress of a comparison and of a race have in common; they say what the line is."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._loss = math.nan
        self._begun = self._printed = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the runs are made. Exits with status 130 when they were asked to stop."""
        try:
            yield
        except Interrupted:
            self._close()
            command = shlex.join(["rarefy", *sys.argv[1:]])
            self.console.print(f"\nstopped and saved; the same command goes on: {command}", soft_wrap=True)
            raise SystemExit(130) from None
        finally:
            self._close()

    def say(self, line: str) -> None:
        """A line of its own."""
        self.console.print(Text(line), soft_wrap=True)

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation."""

    def _open(self) -> None:
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def _show(self, line: Callable[[], str]) -> None:
        if self._live is not None:
            self._live.update(Text(line(), no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self.say(line())

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _tell_end(self, job: Job, record: dict[str, Any]) -> None:
        if record["state"] != "finished":
            self.say(f"{job.label}, seed {job.seed}: {record['state']}: {record['message']}")
            return
        metric = subject_of(record).metric
        figures = f"{metric.show(record['final'])} {metric.title}"
        self.say(f"{job.label}, seed {job.seed}: {figures} in {say.seconds(record['clock']['train_s'])}")
