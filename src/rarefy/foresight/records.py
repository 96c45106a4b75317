"""Runs for the law to be fitted on, out of the records that `rarefy compare text` and `rarefy race` keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rarefy.foresight.fitting import Run
from rarefy.foresight.law import Point

METHODS = ("static", "set")
"""Sparse runs of these count: the law knows nothing of methods, and these are the planner's."""

NETWORK = {"positions": "rotary", "token_shift": True, "activation": "squared_relu"}
"""What the planner's networks are besides their sizes: others learn at other speeds. Records from before there were
these settings are of other networks."""

SAME_LENGTH = 1.25
"""Runs of one network whose bytes differ by less are as long as each other: heats, or finals."""


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Records of the files, and of the .json files of the folders.

    Raises:
        ValueError: a file is no JSON.
        OSError: it cannot be read.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def run_of(record: Mapping[str, Any]) -> Run | None:
    """The run of a record; None if it is not of text, did not finish, or the law is not about such runs: another method
    than static or SET, a ramp for newborn weights, a density that moves, a low-rank part, or other networks than the
    planner's.
    """
    if record["task"] != "text" or record["state"] != "finished":
        return None
    settings = record["settings"]
    plan = settings.get("plan")
    usual = settings.get("mlp") is None and settings.get("parametrization", "standard") == "standard"
    usual = usual and all(settings.get(name) == value for name, value in NETWORK.items())
    if not usual or record["nonzeros"][0] != record["nonzeros"][1]:
        return None
    density, block, method, rate = 1.0, (1, 1), "dense", settings.get("dense_lr")
    if not record["dense"]:
        assert plan is not None, "of a sparse run"
        method, rate = plan["method"]["name"], (settings["lr"], settings["sparse_lr"])
        ordinary = plan["distribution"] == "uniform" and not plan["low_rank"] and not settings["ramp"]
        if method not in METHODS or not ordinary:
            return None
        density = float(record["density"][0])
        block = (plan["block"],) * 2 if isinstance(plan["block"], int) else tuple(plan["block"])
    per_step = settings["batch"] * settings["accumulate"] * settings["context"]
    width, layers, attention = settings["width"], settings["layers"], settings.get("attention") or settings["width"]
    shape = (width, layers, attention, settings["context"], per_step, round(density, 3), block)
    return Run(
        Point(record["nonzeros"][1], record["steps_taken"] * per_step, density, block, layers),
        float(record["curve"]["loss"][-1]),
        tokens_per_step=per_step,
        attention=attention / width,
        network=(method, *shape),
        rate=rate,
    )


def tuned(runs: Sequence[Run]) -> list[Run]:
    """Of runs of one network and length, those of the rate whose mean loss is least: a race is of tuned networks.

    Together they weigh as much as a single run: three seeds tell of one shape at one length.
    """
    chosen: list[Run] = []
    for network in dict.fromkeys(run.network for run in runs):
        same = sorted((run for run in runs if run.network == network), key=lambda run: run.point.tokens)
        while same:
            first = same[0].point.tokens
            level = [run for run in same if run.point.tokens < SAME_LENGTH * first]
            same = same[len(level) :]
            rates: dict[Any, list[Run]] = {}
            for run in level:
                rates.setdefault(run.rate, []).append(run)
            best = min(rates.values(), key=lambda some: float(np.mean([run.loss for run in some])))
            chosen += [replace(run, weight=1 / len(best)) for run in best]
    return chosen
