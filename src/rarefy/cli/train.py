"""`rarefy train text|images`: a network, sparse from its first step, beside its dense twin."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from rarefy.cli.closing import close
from rarefy.cli.console import plain_console
from rarefy.plan import Plan
from rarefy.recipes.images import ImageSettings, ImagesTask
from rarefy.recipes.images.settings import DEFAULT_PLAN as IMAGE_PLAN
from rarefy.recipes.run import check_subject, resume, train
from rarefy.recipes.settings import RunSettings, fixed_steps
from rarefy.recipes.task import Task
from rarefy.recipes.text import TextSettings, TextTask
from rarefy.recipes.text.settings import DEFAULT_PLAN as TEXT_PLAN
from rarefy.rewiring import GuardWarning
from rarefy.training.folder import choose_folder, read_settings
from rarefy.training.interrupt import Interrupted
from rarefy.training.live import LiveLine


def _plan_file(default: Plan) -> tyro.constructors.PrimitiveConstructorSpec[Plan]:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda text: Plan.from_yaml(text[0]),
        is_instance=lambda value: isinstance(value, Plan),
        str_from_instance=lambda plan: ["built in" if plan == default else "the file's or run's"],
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run has besides the recipe's settings."""

    kind: ClassVar[type[Task[Any]]]

    run: Path | None = None
    """Folder of the new run. Without it: runs/<date>-<time>-s<seed>."""

    resume: Path | None = None
    """Folder of a run to go on with, from its last checkpoint, with the settings that it has."""

    config: Path | None = None
    """YAML file that says the same as these options, which override it; a run's run.yaml is one."""

    report: bool = True
    """Write report.html at the end."""

    json: bool = False
    """Print the result as JSON; everything else goes to stderr."""

    @classmethod
    def starting_point(cls, data: dict[str, Any], option: Callable[[str], str | None]) -> dict[str, Any]:
        """What the flags change: `data` of --config, on top of the run's own settings with --resume.

        Raises:
            ValueError: --resume of a run about something else, or --minutes for a run that has its number of steps.
        """
        if isinstance(data.get("plan"), str):  # as on the command line
            data = {**data, "plan": Plan.from_yaml(data["plan"]).to_dict()}
        resume = option("--resume")
        if resume is not None:
            saved = read_settings(Path(resume), cls.kind.subject.name)
            check_subject(Path(resume), cls.kind.subject)
            if option("--minutes") is not None:
                raise ValueError(fixed_steps(resume, saved.get("steps")))
            return {**saved, **data}
        for one, other in (("steps", "minutes"), ("minutes", "steps")):
            if option(f"--{one}") is not None:
                data = {name: value for name, value in data.items() if name != other}
        return data

    def settings(self) -> RunSettings:
        """What defines the run."""
        kind = self.kind.settings_class
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})


@dataclass(frozen=True, kw_only=True)
class Text(Asked, TextSettings):
    """Train a small GPT on bytes, sparse from its first step, beside its dense twin."""

    kind: ClassVar[type[Task[Any]]] = TextTask

    plan: Annotated[Plan, _plan_file(TEXT_PLAN)] = TEXT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""


@dataclass(frozen=True, kw_only=True)
class Images(Asked, ImageSettings):
    """Train a network to tell images apart, sparse from its first step, beside its dense twin."""

    kind: ClassVar[type[Task[Any]]] = ImagesTask

    plan: Annotated[Plan, _plan_file(IMAGE_PLAN)] = IMAGE_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    eval_images: int | None = 2000
    """Validation images looked at at each evaluation, the same each time, drawn at random; at the end all are, once."""


def run(asked: Text | Images) -> None:
    """Train, or go on training, and show the result. Exits with status 130 when asked to stop."""
    console = plain_console(json=asked.json)
    listener = LiveLine(console, asked.kind.subject)
    if asked.resume is not None and asked.run is not None:
        raise ValueError(f"--run {asked.run} names a new run and --resume {asked.resume} an old one: give one of them")
    folder = asked.resume if asked.resume is not None else choose_folder(asked.run, asked.seed)
    warnings.filterwarnings("ignore", category=GuardWarning)  # the live line and the closing table say the same
    try:
        if asked.resume is not None:
            outcome = resume(asked.kind, folder, listener, asked=asked.settings())
        else:
            listener.say(f"run: {folder}")
            command = ["rarefy", *sys.argv[1:]]
            outcome = train(asked.kind, asked.settings(), folder, listener, command=command)
    except Interrupted:
        console.print(
            f"\nstopped and saved; go on with: rarefy train {asked.kind.subject.name} --resume "
            f"{shlex.quote(str(folder))}",
            soft_wrap=True,
        )
        raise SystemExit(130) from None
    result = close(outcome, console, report=asked.report)
    if asked.json:
        print(json.dumps(result, indent=1))


TASKS = {"text": (Text, run), "images": (Images, run)}
