"""A whole race, from what the user asked for to its verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rarefy.compare.comparison import Comparison, identity, summary
from rarefy.compare.contenders import Contender, parse_contenders
from rarefy.compare.jobs import Job, jobs
from rarefy.compare.pace import Equal, paces, steps_of
from rarefy.compare.records import RECORDS
from rarefy.compare.schedule import Listener, alone_in
from rarefy.files import atomic_write, remove_leftovers
from rarefy.race.course import run_together
from rarefy.race.heats import control, finalists
from rarefy.race.modes import in_fastest_mode
from rarefy.race.verdict import Verdict, verdict
from rarefy.recipes.task import Task
from rarefy.training.machine import check_device

FILE = "race.json"


@dataclass(frozen=True, kw_only=True)
class Race:
    """What the user asked for, besides the recipe's settings."""

    minutes: float
    """Training time of each finalist; evaluations come on top."""
    contenders: tuple[str, ...] = ()
    """Who runs, as `rarefy compare` writes them; none: the task's own field."""
    seeds: tuple[int, ...] = (0,)
    """Of the final. Heats are run with the first."""
    heat_minutes: float = 0.0
    """Training time of each in the heats; 0: none, and everybody is in the final."""
    each: int = 1
    """Finalists of each kind: dense, static, rewiring."""
    compiled: bool = True
    """Whether torch.compile is tried."""
    out: Path | None = None
    """Folder; None: runs/race-<id>, which follows from the recipe's settings and data."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"the budget must be positive, got {self.minutes:g} minutes")
        if not self.heat_minutes >= 0:
            raise ValueError(f"heats must not be negative, got {self.heat_minutes:g} minutes")
        if self.each < 1:
            raise ValueError(f"finalists must be at least 1, got {self.each}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A race that has been run."""

    folder: Path
    records: dict[str, dict[str, Any]]
    """Digest -> record of every run of the final."""
    data: dict[str, Any]
    """What race.json says: a comparison's summary, with "verdict" and "heats"."""


def race(task: Task, asked: Race, listener: Listener, *, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Run what has not been run, and say who won.

    Raises:
        ValueError: contenders, seeds or settings that cannot be used, a damaged file, or another race in the folder.
        Interrupted: asked to stop; everything is saved.
        OSError: a file could not be written.
    """
    check_device(task.base.device)
    if task.base.threads is not None:
        torch.set_num_threads(task.base.threads)
    field = parse_contenders(asked.contenders or task.field(asked.minutes), task)
    jobs(task, field, asked.seeds, lambda _: 100)  # refuses what it refuses before anything is timed
    folder = asked.out if asked.out is not None else Path("runs") / f"race-{identity(task)}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"race: {folder}")
    say(f"data: {task.source}")
    with alone_in(folder):
        (folder / RECORDS).mkdir(exist_ok=True)
        for place in (folder, folder / RECORDS):
            remove_leftovers(place)
        run = _Stage(task, folder, listener, say)
        field = in_fastest_mode(folder, task, field, say, compiled=asked.compiled)
        heats: dict[str, Any] | None = None
        if asked.heat_minutes:
            say(f"heats: {len(field)} contenders, {asked.heat_minutes:g} minutes of training each")
            heat = run([_judged_at_the_end(one) for one in field], asked.seeds[:1], asked.heat_minutes)
            by_label = {job.label: heat.records[job.digest] for job in heat.jobs}
            field = finalists(task, field, by_label, asked.each)
            more = control(task, field, by_label)
            field += in_fastest_mode(folder, task, more, say, compiled=asked.compiled)
            heats = heat.summary
        say(f"final: {', '.join(one.label for one in field)}; {asked.minutes:g} minutes of training each")
        final = run(field, asked.seeds, asked.minutes)
        found = _verdict(task, final.jobs, final.records)
        data = {**final.summary, "verdict": dataclasses.asdict(found), "heats": heats}
        atomic_write(folder / FILE, (json.dumps(data, indent=1) + "\n").encode())
    return Outcome(folder=folder, records=final.records, data=data)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What a stage has left."""

    jobs: list[Job]
    records: dict[str, dict[str, Any]]
    summary: dict[str, Any]


class _Stage:
    """Heats or final: equal time for all, paces measured once."""

    def __init__(self, task: Task, folder: Path, listener: Listener, say: Callable[[str], None]) -> None:
        self.task, self.folder, self.listener, self.say = task, folder, listener, say

    def __call__(self, contenders: Sequence[Contender], seeds: Sequence[int], minutes: float) -> _Made:
        equal = Equal(by="minutes", amount=minutes)
        known = paces(self.folder, self.task, contenders, self.say, seconds=equal.rehearsed_s)
        found = jobs(self.task, contenders, seeds, lambda one: steps_of(equal, known, one))
        records: dict[str, dict[str, Any]] = {}
        for seed in seeds:  # what differs is to meet the same machine; seeds need not
            records |= run_together(self.task, [job for job in found if job.seed == seed], self.folder, self.listener)
        labels = tuple(contender.label for contender in contenders)
        asked = Comparison(plans=labels, seeds=tuple(seeds), budget=equal)
        return _Made(jobs=found, records=records, summary=summary(self.task, asked, found, records))


def _judged_at_the_end(contender: Contender) -> Contender:
    """Not evaluated on the way, unless the user says how often: in heats nothing but the end counts."""
    return dataclasses.replace(contender, settings=dataclasses.replace(contender.settings, evaluations=1))


def _verdict(task: Task, found: Sequence[Job], records: Mapping[str, Mapping[str, Any]]) -> Verdict:
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for job in found:
        runs.setdefault(job.label, []).append(records[job.digest])
    return verdict(runs, task.metric)
