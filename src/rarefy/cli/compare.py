"""`rarefy compare text|images`: plans x seeds at equal steps, equal time or equal FLOPs, with spread."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rarefy.cli.compare_table import show
from rarefy.cli.console import plain_console
from rarefy.cli.progress import Progress
from rarefy.compare import Comparison, Equal, ImagesTask, Task, TextTask, compare
from rarefy.plan import Plan
from rarefy.recipes.images import ImageSettings
from rarefy.recipes.text import TextSettings
from rarefy.recipes.text.settings import DEFAULT_PLAN
from rarefy.report.comparison import build_comparison

Hidden = tyro.conf.Suppress


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a comparison has besides the recipe's settings."""

    plans: tuple[str, ...] = ()
    """Contenders: methods by name (static set rigl ...), with settings of their own after a colon
    (set:interval=200,sparse_lr=0.01), presets (set.itop), plan files (mine.yaml), dense, and small-dense, a narrower
    dense network of as many weights."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each contender is trained once with each."""

    steps: int | None = None
    """Equal steps: so many for everybody."""

    minutes: float | None = None
    """Equal time: minutes of training of each run, by paces measured once and kept. Without any: 5."""

    flops: float | None = None
    """Equal FLOPs: floating-point operations of training of each run, such as 1e14."""

    out: Path | None = None
    """Folder of the comparison. Without it: runs/compare-<id>; the same settings find it again."""

    against: str | None = None
    """Contender that the others are held against, by seed. Without it: static."""

    jobs: int = 1
    """Runs at the same time, in processes of their own, each with --threads threads."""

    report: bool = True
    """Write compare.html."""

    json: bool = False
    """Print the result as JSON; everything else goes to stderr."""

    config: Path | None = None
    """YAML file that says the same as these options, which override it."""

    plan: Hidden[Plan] = DEFAULT_PLAN
    method: Hidden[str | None] = None
    seed: Hidden[int] = 0
    twin: Hidden[bool] = False
    measure: Hidden[bool] = False
    slice_steps: Hidden[int] = 5
    sample_bytes: Hidden[int] = 0

    @classmethod
    def starting_point(cls, data: dict[str, Any], option: Callable[[str], str | None]) -> dict[str, Any]:
        """What the flags change: a budget given as a flag takes the place of the file's.

        Raises:
            ValueError: the file says what each contender says for itself.
        """
        budgets = ("steps", "minutes", "flops")
        if any(option(f"--{name}") is not None for name in budgets):
            data = {name: value for name, value in data.items() if name not in budgets}
        for name, instead in (("plan", "plans"), ("method", "plans"), ("seed", "seeds"), ("twin", "plans: dense")):
            if name in data:
                raise ValueError(f"a comparison has no {name!r}: say it with {instead!r}")
        return data

    def comparison(self) -> Comparison:
        """Raises ValueError when two budgets are given, or one that is not positive."""
        given: list[Equal] = []
        if self.steps is not None:
            given.append(Equal(by="steps", amount=self.steps))
        if self.minutes is not None:
            given.append(Equal(by="minutes", amount=self.minutes))
        if self.flops is not None:
            given.append(Equal(by="flops", amount=self.flops))
        if len(given) > 1:
            raise ValueError(f"{' and '.join(one.by for one in given)} both say what is equal: give one of them")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        return Comparison(
            plans=self.plans,
            seeds=self.seeds,
            budget=given[0] if given else Equal(by="minutes", amount=5.0),
            out=self.out,
            against=self.against,
            at_once=self.jobs,
        )


def recipe(asked: Any, kind: type[Any]) -> Any:
    """The recipe's settings, without what belongs to the comparison."""
    own = {field.name: getattr(asked, field.name) for field in dataclasses.fields(kind)}
    return kind(**{**own, "steps": None, "minutes": None})


@dataclass(frozen=True, kw_only=True)
class Text(Asked, TextSettings):
    """Compare ways of finding the pattern of a small GPT on bytes."""

    eval_bytes: int = 65536
    """Bytes of validation text predicted at each evaluation."""

    def __post_init__(self) -> None:
        recipe(self, TextSettings)

    def task(self) -> Task:
        """Reads the text."""
        return TextTask(recipe(self, TextSettings))


@dataclass(frozen=True, kw_only=True)
class Images(Asked, ImageSettings):
    """Compare ways of finding the pattern of a network on images, such as Fashion-MNIST or CIFAR-10."""

    plan: Hidden[Plan] = ImageSettings.plan

    def __post_init__(self) -> None:
        recipe(self, ImageSettings)

    def task(self) -> Task:
        """Reads the images."""
        return ImagesTask(recipe(self, ImageSettings))


def run(asked: Text | Images) -> None:
    """Make what is missing, and show the table. Exits with status 130 when asked to stop."""
    console = plain_console(json=asked.json)
    progress = Progress(console)
    comparison = asked.comparison()
    task = asked.task()
    with progress.watching():
        outcome = compare(task, comparison, progress, say=progress.say)
    show(outcome.data, console)
    if asked.report:
        console.print(f"report: {build_comparison(outcome.folder, outcome.data, outcome.records)}", soft_wrap=True)
    if asked.json:
        print(json.dumps(outcome.data, indent=1))


TASKS = {"text": (Text, run), "images": (Images, run)}
