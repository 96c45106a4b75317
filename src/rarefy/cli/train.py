"""`rarefy train text`: a language model on bytes, sparse from its first step, beside its dense twin."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from rarefy.cli.closing import close
from rarefy.plan import Plan
from rarefy.recipes.text import TextSettings, resume_text, train_text
from rarefy.recipes.text.settings import DEFAULT_PLAN, fixed_steps
from rarefy.rewiring import GuardWarning
from rarefy.training.folder import choose_folder, read_settings
from rarefy.training.interrupt import Interrupted
from rarefy.training.live import LiveLine

_plan_file = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FILE",
    instance_from_str=lambda text: Plan.from_yaml(text[0]),
    is_instance=lambda value: isinstance(value, Plan),
    str_from_instance=lambda plan: ["built in" if plan == DEFAULT_PLAN else "the file's or run's"],
)


@dataclass(frozen=True, kw_only=True)
class Text(TextSettings):
    """Train a small GPT on bytes, sparse from its first step, beside its dense twin."""

    plan: Annotated[Plan, _plan_file] = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

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
            ValueError: --minutes for a run that has its number of steps.
        """
        if isinstance(data.get("plan"), str):  # as on the command line
            data = {**data, "plan": Plan.from_yaml(data["plan"]).to_dict()}
        resume = option("--resume")
        if resume is not None:
            saved = read_settings(Path(resume))
            if option("--minutes") is not None:
                raise ValueError(fixed_steps(resume, saved.get("steps")))
            return {**saved, **data}
        for one, other in (("steps", "minutes"), ("minutes", "steps")):
            if option(f"--{one}") is not None:
                data = {name: value for name, value in data.items() if name != other}
        return data

    def settings(self) -> TextSettings:
        """What defines the run."""
        return TextSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TextSettings)})


def run(text: Text) -> None:
    """Train, or go on training, and show the result. Exits with status 130 when asked to stop."""
    console = Console(stderr=text.json, highlight=False)
    listener = LiveLine(console)
    if text.resume is not None and text.run is not None:
        raise ValueError(f"--run {text.run} names a new run and --resume {text.resume} an old one: give one of them")
    folder = text.resume if text.resume is not None else choose_folder(text.run, text.seed)
    warnings.filterwarnings("ignore", category=GuardWarning)  # the live line and the closing table say the same
    try:
        if text.resume is not None:
            outcome = resume_text(folder, listener, asked=text.settings())
        else:
            listener.say(f"run: {folder}")
            outcome = train_text(text.settings(), folder, listener, command=["rarefy", *sys.argv[1:]])
    except Interrupted:
        console.print(
            f"\nstopped and saved; go on with: rarefy train text --resume {shlex.quote(str(folder))}", soft_wrap=True
        )
        raise SystemExit(130) from None
    result = close(outcome, console, report=text.report)
    if text.json:
        print(json.dumps(result, indent=1))


TASKS = {"text": (Text, run)}
