"""In which precision, and compiled or not, a network trains fastest on this machine.

Both sides have the same choice: activations in fp32 or bf16, with or without torch.compile. What the user says of a
contender is left as it is.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rarefy.compare.contenders import Contender
from rarefy.compare.jobs import make_job
from rarefy.files import atomic_write
from rarefy.recipes.task import Task
from rarefy.training.machine import machine

FILE = "modes.json"

WARM_UP, TIMED = 3, 7
"""Steps of each mode: those that compile and allocate, and those that count."""

WORTH_IT = 0.97
"""A mode that takes more than this share of the plain one's time is not taken."""

STEPS = 1000
"""Of the run that the steps are the first of; layers do not rewire in them."""


def in_fastest_mode(
    folder: Path, task: Task, contenders: Sequence[Contender], say: Callable[[str], None], *, compiled: bool
) -> list[Contender]:
    """The contenders with the mode that is fastest for each; found once and kept in the folder.

    Args:
        compiled: try torch.compile too, which takes about a minute a contender.
    Raises:
        ValueError: modes.json is damaged.
    """
    kept = _read(folder / FILE)
    chosen = []
    for contender in contenders:
        key = make_job(task, contender, 0, STEPS).digest + ("-compiled" if compiled else "")
        if key not in kept["modes"]:
            say(f"timing {contender.label} in fp32 and bf16{', compiled and not' if compiled else ''} ...")
            kept["modes"][key] = {"label": contender.label, **_fastest(task, contender, compiled=compiled)}
            atomic_write(folder / FILE, (json.dumps(kept, indent=1) + "\n").encode())
        mode = kept["modes"][key]["mode"]
        chosen.append(dataclasses.replace(contender, settings=dataclasses.replace(contender.settings, **mode)))
    return chosen


def _fastest(task: Task, contender: Contender, *, compiled: bool) -> dict[str, Any]:
    """{"mode": settings, "seconds": {name: of a step}}."""
    settings = contender.settings
    precisions = [settings.precision] if settings.precision is not None else [None, "bf16"]
    ways = [settings.compile] if settings.compile is not None else [None, True] if compiled else [None]
    modes = [{"precision": precision, "compile": way} for precision in precisions for way in ways]
    if len(modes) == 1:
        return {"mode": modes[0], "seconds": {}}
    seconds = _time(task, contender, modes)
    best = min(range(len(modes)), key=lambda at: seconds[at] * (1.0 if at else WORTH_IT))
    return {"mode": modes[best], "seconds": {_name(mode): taken for mode, taken in zip(modes, seconds, strict=True)}}


def _name(mode: dict[str, Any]) -> str:
    return f"{mode['precision'] or 'fp32'}{', compiled' if mode['compile'] else ''}"


def _time(task: Task, contender: Contender, modes: Sequence[dict[str, Any]]) -> list[float]:
    """Median seconds of a step in each, a step each in turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with so short a run says nothing of the real one
        settled = contender.settled(0, STEPS)
        versions = [dataclasses.replace(settled, **mode) for mode in modes]
        twins = [task.make(version, dense=contender.dense) for version in versions]
        loop, (data, _) = settled.loop(), task.feed(settled)
        seconds: list[list[float]] = [[] for _ in twins]
        for step in range(WARM_UP + TIMED):
            for twin, taken in zip(twins, seconds, strict=True):
                before = twin.clock.train_s
                twin.train_step(data, rate=loop.rate(step + 1), accumulate=loop.accumulate, clip=loop.clip)
                taken.append(twin.clock.train_s - before)
    return [median(taken[WARM_UP:]) for taken in seconds]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"machine": machine(), "modes": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in found["modes"].values():
            if set(entry["mode"]) != {"precision", "compile"}:
                raise ValueError("an entry makes no sense")
        return {"machine": found["machine"], "modes": found["modes"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and everybody is timed again") from error
