"""The runs of a comparison: one for each contender and seed, known by a digest of all that defines it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.compare.contenders import Contender
from rarefy.recipes.task import Task
from rarefy.settings import to_plain

FORMAT = 1
"""Of records; raised when the same settings come to mean another run."""

NOT_DEFINING = frozenset(
    {
        "data", "image_column", "label_column", "minutes", "twin", "measure", "evaluations", "slice_steps",
        "checkpoint_s", "recompute", "sample_bytes", "threads",
    }
)  # fmt: skip
"""Settings that say where and how a run goes, not what comes out of it."""

ONLY_SPARSE = frozenset({"plan", "lr", "sparse_lr", "optimizer", "ramp"})
"""Settings that a dense network does not look at, but for SGD."""

ONLY_DENSE = frozenset({"dense_lr"})


@dataclass(frozen=True)
class Job:
    """A run to be made, or one that has been made."""

    label: str
    seed: int
    dense: bool
    settings: Any
    """The recipe's, settled."""
    defines: dict[str, Any]
    """All that defines the run, as plain data."""

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def digest(self) -> str:
        """Names the run: the same on every machine, at any time, under any label."""
        text = json.dumps(self.defines, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """Name of its record."""
        slug = re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.")[:40]
        return f"{slug}-s{self.seed}-{self.digest}.json"


def jobs(
    task: Task, contenders: Sequence[Contender], seeds: Sequence[int], steps: Callable[[Contender], int]
) -> list[Job]:
    """Every contender with every seed: all of the first seed, then all of the next, so that a comparison that is
    stopped has something to show.

    Raises:
        ValueError: no seed, one twice, or two contenders that mean the same run.
    """
    if not seeds:
        raise ValueError("which seeds? for example --seeds 0 1 2")
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if list(seeds).count(seed) > 1)
        raise ValueError(f"seeds: {twice} is there twice")
    found = [make_job(task, contender, seed, steps(contender)) for seed in seeds for contender in contenders]
    labels: dict[str, str] = {}
    for job in found:
        other = labels.setdefault(job.digest, job.label)
        if other != job.label:
            raise ValueError(f"plans: {other!r} and {job.label!r} mean the same run: leave one of them out")
    return found


def make_job(task: Task, contender: Contender, seed: int, steps: int) -> Job:
    """One run."""
    settings = contender.settled(seed, steps)
    left_out = NOT_DEFINING | (ONLY_SPARSE if contender.dense else ONLY_DENSE)
    if contender.dense and getattr(settings, "optimizer", "") == "sgd":
        left_out = left_out - {"optimizer"}
    named = {field.name: to_plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    defines = {
        "format": FORMAT,
        "task": task.name,
        "data": task.data.digest,
        "dense": contender.dense,
        "settings": without_none({name: value for name, value in named.items() if name not in left_out}),
    }
    if task.all_held_out(settings) is not None:
        defines["judged"] = "all"  # where it goes without saying, records from before runs had two judges are as good
    return Job(contender.label, seed, contender.dense, settings, defines)


def without_none(data: Any) -> Any:
    """The same without fields that say nothing, so that a new setting that is off changes no digest."""
    if isinstance(data, dict):
        return {key: without_none(value) for key, value in data.items() if value is not None}
    return [without_none(value) for value in data] if isinstance(data, list) else data
