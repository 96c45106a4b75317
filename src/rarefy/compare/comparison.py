"""A whole comparison, from what the user asked for to its table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from rarefy.compare.contenders import parse_contenders
from rarefy.compare.jobs import NOT_DEFINING, Job, jobs, without_none
from rarefy.compare.pace import Equal, paces, steps_of
from rarefy.compare.records import RECORDS
from rarefy.compare.schedule import Listener, alone_in, make_all
from rarefy.compare.table import choose_baseline, make_table
from rarefy.files import atomic_write, remove_leftovers
from rarefy.recipes.task import Task
from rarefy.settings import to_plain
from rarefy.training.machine import check_device

FILE = "comparison.json"

SETTINGS = "compare.yaml"
"""What was asked for, as --config reads it, but for where the data lies."""

NOT_ASKED = (
    "data", "image_column", "label_column", "steps", "minutes", "seed", "plan", "method", "twin", "measure",
    "slice_steps", "sample_bytes",
)  # fmt: skip
"""Settings of a recipe that a comparison says in another way, or has no use for."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the user asked for, besides the recipe's settings."""

    plans: tuple[str, ...]
    """Contenders."""
    seeds: tuple[int, ...]
    budget: Equal
    """What is equal."""
    out: Path | None = None
    """Folder; None: runs/compare-<id>, which follows from the recipe's settings and data, so that the same command
    finds it again, and so does one with more plans or seeds."""
    against: str | None = None
    """Label of the contender that the others are held against; None: static, if it is there."""
    at_once: int = 1
    """Runs at the same time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A comparison that has been made."""

    folder: Path
    jobs: list[Job]
    records: dict[str, dict[str, Any]]
    """Digest -> record."""
    data: dict[str, Any]
    """What comparison.json says."""


def compare(
    task: Task, asked: Comparison, listener: Listener, *, say: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Make the runs that are missing, and put all of them side by side.

    Raises:
        ValueError: contenders, seeds or settings that cannot be used, a damaged file, or another comparison at work in
            the folder.
        Interrupted: asked to stop; everything is saved.
        OSError: a file could not be written.
    """
    check_device(task.base.device)
    if task.base.threads is not None:
        torch.set_num_threads(task.base.threads)
    elif asked.at_once > 1:  # as many as there are, shared
        torch.set_num_threads(max(1, torch.get_num_threads() // asked.at_once))
    contenders = parse_contenders(asked.plans, task)
    choose_baseline([contender.label for contender in contenders], asked.against)
    jobs(task, contenders, asked.seeds, lambda _: 100)  # refuses what it refuses before anything is timed
    folder = asked.out if asked.out is not None else Path("runs") / f"compare-{identity(task)}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"comparison: {folder}")
    say(f"data: {task.source}")
    with alone_in(folder):
        (folder / RECORDS).mkdir(exist_ok=True)
        atomic_write(folder / SETTINGS, yaml.safe_dump(_as_asked(task, asked), sort_keys=False).encode())
        for place in (folder, folder / RECORDS):
            remove_leftovers(place)
        equal = asked.budget
        known = {} if equal.by == "steps" else paces(folder, task, contenders, say, seconds=equal.rehearsed_s)
        found = jobs(task, contenders, asked.seeds, lambda one: steps_of(equal, known, one))
        records = make_all(task, found, folder, listener, at_once=asked.at_once)
        data = summary(task, asked, found, records)
        atomic_write(folder / FILE, (json.dumps(data, indent=1) + "\n").encode())
    return Outcome(folder=folder, jobs=found, records=records, data=data)


def summary(
    task: Task, asked: Comparison, found: list[Job], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What was compared, and the table, as comparison.json has them."""
    return {
        "task": task.name,
        "data": {"name": task.data.name, "digest": task.data.digest},
        "metric": {
            "key": task.metric.key,
            "title": task.metric.title,
            "higher_is_better": task.metric.higher_is_better,
            "percent": task.metric.percent,
        },
        "judged": task.judged(),
        "budget": {"by": asked.budget.by, "amount": asked.budget.amount},
        "seeds": list(asked.seeds),
        "settings": _shared(task),
        "machines": _machines(records),
        "runs": [{"label": job.label, "seed": job.seed, "file": f"{RECORDS}/{job.file}"} for job in found],
        "table": make_table(found, records, key=task.metric.key, against=asked.against),
    }


def _as_asked(task: Task, asked: Comparison) -> dict[str, Any]:
    """What differs from the defaults."""
    changed = {
        field.name: to_plain(getattr(task.base, field.name))
        for field in dataclasses.fields(task.base)
        if field.name not in NOT_ASKED and getattr(task.base, field.name) != field.default
    }
    amount = asked.budget.amount
    whole = int(amount) if asked.budget.by == "steps" else amount
    against = {} if asked.against is None else {"against": asked.against}
    return {"plans": list(asked.plans), "seeds": list(asked.seeds), asked.budget.by: whole, **against, **changed}


def _machines(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those that the runs were made on, each once."""
    seen: list[dict[str, Any]] = []
    for record in records.values():
        if record["clock"]["machine"] not in seen:
            seen.append(record["clock"]["machine"])
    return seen


def _shared(task: Task) -> dict[str, Any]:
    """The recipe's settings that all contenders share, but for where the data lies."""
    plain = {name: value for name, value in to_plain(task.base).items() if name not in NOT_DEFINING}
    plain["plan"] = {name: value for name, value in plain["plan"].items() if name not in ("method", "seed")}
    return without_none({**plain, "steps": None, "seed": None})


def identity(task: Task) -> str:
    text = json.dumps([task.name, task.data.digest, _shared(task)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
