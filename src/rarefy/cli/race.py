"""`rarefy race`: dense and sparse language models under one clock, and a verdict in one sentence."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rarefy.cli.compare import recipe
from rarefy.cli.compare_table import show_table
from rarefy.compare import TextTask
from rarefy.compare.jobs import Job
from rarefy.plan import Plan
from rarefy.race import Race as Asked
from rarefy.race import race
from rarefy.recipes.text import TextSettings
from rarefy.recipes.text.settings import DEFAULT_PLAN
from rarefy.report import numbers as say
from rarefy.report.race import build_race, cells, columns, legend, sentences, sizes_of
from rarefy.training.interrupt import Interrupted
from rarefy.training.twin import StepResult, Twin

Hidden = tyro.conf.Suppress

HEAT_SHARE, LEAST_HEAT = 0.25, 0.5
"""A heat is so much of the budget, and at least so many minutes."""

PLAIN_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Race(TextSettings):
    """Race dense against sparse: small GPTs on your text, the same training time each, in turn under one clock."""

    budget: str = "3m"
    """Training time of each finalist: 90s, 10m, 1.5h."""

    contenders: tuple[str, ...] = ()
    """Who runs: static, set, rigl or another method, dense, plan files; with settings of their own after a colon
    (set:width=384,block=4 dense:width=192,dense_lr=0.002). Without any: heats among a ladder of dense networks and as
    many sparse ones choose the finalists."""

    heats: str | None = None
    """Training time of each contender in the heats; 0: none, and all are in the final. Without it: a quarter of the
    budget, or 0 where --contenders are given."""

    finalists: int = 1
    """The best so many dense, static and rewiring contenders of the heats are in the final."""

    seeds: tuple[int, ...] = (0,)
    """The final is run once with each."""

    try_compile: bool = True
    """Try torch.compile for every contender, and keep it where it is faster. About a minute a contender."""

    out: Path | None = None
    """Folder of the race. Without it: runs/race-<id>; the same settings find it again."""

    report: bool = True
    """Write race.html."""

    json: bool = False
    """Print the result as JSON; everything else goes to stderr."""

    config: Path | None = None
    """YAML file that says the same as these options, which override it."""

    evaluations: int = 40
    """Evaluations of a run, of which times between are read off."""

    eval_bytes: int = 65536
    """Bytes of validation text predicted at each evaluation."""

    plan: Hidden[Plan] = DEFAULT_PLAN
    steps: Hidden[int | None] = None
    minutes: Hidden[float | None] = None
    method: Hidden[str | None] = None
    seed: Hidden[int] = 0
    twin: Hidden[bool] = False
    measure: Hidden[bool] = False
    slice_steps: Hidden[int] = 5
    sample_bytes: Hidden[int] = 0

    def __post_init__(self) -> None:
        recipe(self, TextSettings)

    def asked(self) -> Asked:
        """Raises ValueError for a time that cannot be read, or a number that makes no sense."""
        minutes = minutes_of("budget", self.budget)
        heat = 0.0 if self.contenders else max(LEAST_HEAT, HEAT_SHARE * minutes)
        return Asked(
            minutes=minutes,
            contenders=self.contenders,
            seeds=self.seeds,
            heat_minutes=heat if self.heats is None else minutes_of("heats", self.heats),
            each=self.finalists,
            compiled=self.try_compile,
            out=self.out,
        )


def minutes_of(name: str, text: str) -> float:
    """90s, 10m, 1.5h, or a number of minutes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", text)
    if found is None:
        raise ValueError(f"{name} must be a time such as 90s, 10m or 1.5h, got {text!r}")
    return float(found[1]) * {"s": 1 / 60, "m": 1.0, "": 1.0, "h": 60.0}[found[2]]


def run(asked: Race) -> None:
    """Run what is missing, and show the verdict. Exits with status 130 when asked to stop."""
    console = Console(stderr=asked.json, highlight=False)
    progress = Progress(console)
    wanted = asked.asked()
    task = TextTask(recipe(asked, TextSettings))
    try:
        outcome = race(task, wanted, progress, say=progress.say)
    except Interrupted:
        progress.stop()
        command = shlex.join(["rarefy", *sys.argv[1:]])
        console.print(f"\nstopped and saved; the same command goes on: {command}", soft_wrap=True)
        raise SystemExit(130) from None
    finally:
        progress.stop()
    data = outcome.data
    sizes = sizes_of(data, outcome.records)
    show_table(data, columns(data), [cells(data, row, sizes) for row in data["table"]["rows"]], legend(data), console)
    first, *others = sentences(data)
    console.print(Text(first, style="bold"), soft_wrap=True)
    for line in others:
        console.print(Text(line), soft_wrap=True)
    if asked.report:
        console.print(f"report: {build_race(outcome.folder, data, outcome.records)}", soft_wrap=True)
    if asked.json:
        print(json.dumps(data, indent=1))


class Progress:
    """All runs of a stage on their way together: one live line on a terminal, a plain line now and then elsewhere."""

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
        figures = f"{record['metric'].replace('_', ' ')} {record['final']:.4f}"
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
