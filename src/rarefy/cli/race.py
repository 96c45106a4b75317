"""`rarefy race [text|images]`: dense and sparse networks under one clock, and a verdict in one sentence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.text import Text as Line

from rarefy.cli.compare import recipe
from rarefy.cli.compare_table import show_table
from rarefy.cli.console import plain_console
from rarefy.cli.race_progress import Progress
from rarefy.compare import ImagesTask, Task, TextTask
from rarefy.plan import Plan
from rarefy.race import Race, race
from rarefy.recipes.images import ImageSettings
from rarefy.recipes.text import TextSettings
from rarefy.report.race import build_race, cells, columns, legend, sentences, sizes_of

Hidden = tyro.conf.Suppress

HEAT_SHARE, LEAST_HEAT = 0.25, 0.5
"""A heat is so much of the budget, and at least so many minutes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a race has besides the recipe's settings."""

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

    steps: Hidden[int | None] = None
    minutes: Hidden[float | None] = None
    method: Hidden[str | None] = None
    seed: Hidden[int] = 0
    twin: Hidden[bool] = False
    measure: Hidden[bool] = False
    slice_steps: Hidden[int] = 5

    def asked(self) -> Race:
        """Raises ValueError for a time that cannot be read, or a number that makes no sense."""
        minutes = minutes_of("budget", self.budget)
        heat = 0.0 if self.contenders else max(LEAST_HEAT, HEAT_SHARE * minutes)
        return Race(
            minutes=minutes,
            contenders=self.contenders,
            seeds=self.seeds,
            heat_minutes=heat if self.heats is None else minutes_of("heats", self.heats),
            each=self.finalists,
            compiled=self.try_compile,
            out=self.out,
        )


@dataclass(frozen=True, kw_only=True)
class Text(Asked, TextSettings):
    """Race dense against sparse: small GPTs on your text, the same training time each, in turn under one clock."""

    evaluations: int = 40
    """Evaluations of a run, of which times between are read off."""

    eval_bytes: int = 65536
    """Bytes of validation text predicted at each evaluation."""

    plan: Hidden[Plan] = TextSettings.plan
    sample_bytes: Hidden[int] = 0

    def __post_init__(self) -> None:
        recipe(self, TextSettings)

    def task(self) -> Task:
        """Reads the text."""
        return TextTask(recipe(self, TextSettings))


@dataclass(frozen=True, kw_only=True)
class Images(Asked, ImageSettings):
    """Race dense against sparse: networks that tell your images apart, the same training time each, in turn under one
    clock.
    """

    contenders: tuple[str, ...] = ()
    """Who runs: static, set, rigl or another method, dense, plan files; with settings of their own after a colon
    (set:width=2,lr=0.005 dense:width=1,dense_lr=0.002). Without any: heats among a ladder of dense networks and as many
    sparse ones choose the finalists."""

    evaluations: int = 20
    """Evaluations of a run, of which times between are read off."""

    eval_images: int | None = 2000
    """Validation images looked at at each evaluation, the same each time, drawn at random; at the end all are, once."""

    plan: Hidden[Plan] = ImageSettings.plan

    def __post_init__(self) -> None:
        recipe(self, ImageSettings)

    def task(self) -> Task:
        """Reads the images."""
        return ImagesTask(recipe(self, ImageSettings))


def minutes_of(name: str, text: str) -> float:
    """90s, 10m, 1.5h, or a number of minutes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", text)
    if found is None:
        raise ValueError(f"{name} must be a time such as 90s, 10m or 1.5h, got {text!r}")
    return float(found[1]) * {"s": 1 / 60, "m": 1.0, "": 1.0, "h": 60.0}[found[2]]


def run(asked: Text | Images) -> None:
    """Run what is missing, and show the verdict. Exits with status 130 when asked to stop."""
    console = plain_console(json=asked.json)
    progress = Progress(console)
    wanted = asked.asked()
    task = asked.task()
    with progress.watching():
        outcome = race(task, wanted, progress, say=progress.say)
    data = outcome.data
    sizes = sizes_of(data, outcome.records)
    show_table(data, columns(data), [cells(data, row, sizes) for row in data["table"]["rows"]], legend(data), console)
    first, *others = sentences(data)
    console.print(Line(first, style="bold"), soft_wrap=True)
    for line in others:
        console.print(Line(line), soft_wrap=True)
    if asked.report:
        console.print(f"report: {build_race(outcome.folder, data, outcome.records)}", soft_wrap=True)
    if asked.json:
        print(json.dumps(data, indent=1))


TASKS = {"text": (Text, run), "images": (Images, run)}

USUAL = "text"
"""What `rarefy race` without a word for it is about."""
