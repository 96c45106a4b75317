"""A run's folder: its name, what says that it is one, and the files that are written once.

run.yaml (the settings), plan.json (what was decided per layer), metrics.jsonl, latest.json and checkpoints, and at the
end summary.json, sample.txt or images.json, model.safetensors and report.html. run.yaml comes last of those that a
resume needs: a folder with it is a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rarefy.files import atomic_write

SETTINGS, PLAN, SUMMARY, SAMPLE, IMAGES = "run.yaml", "plan.json", "summary.json", "sample.txt", "images.json"


def choose_folder(run: Path | None, seed: int) -> Path:
    """The folder of a new run: the one named, or runs/<date>-<time>-s<seed>. Nothing is created yet.

    Raises:
        ValueError: there is a run, or anything else, in the one named.
    """
    if run is None:
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-s{seed}"
        names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
        return next(folder for name in names if not (folder := Path("runs") / name).exists())
    if (run / SETTINGS).is_file():
        raise ValueError(f"{run} holds a run already: go on with it by --resume {run}, or give --run another name")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} exists and is no empty folder: give --run another name")
    return run


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """plan.json: an `Explanation` as plain data."""
    atomic_write(folder / PLAN, (json.dumps(plan, indent=1) + "\n").encode())


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """run.yaml: plain data, which `--config` reads too."""
    atomic_write(folder / SETTINGS, yaml.safe_dump(dict(settings), sort_keys=False).encode())


def read_settings(folder: Path, task: str = "text") -> dict[str, Any]:
    """What `write_settings` wrote.

    Args:
        task: what the run is to be of, for the message that says how to start one.
    Raises:
        ValueError: the folder is no run, or run.yaml is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        what = f"it has no {SETTINGS}" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"{folder} is no run that could go on: {what}; start one with rarefy train {task} --run {folder}"
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return found


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """The layers of plan.json.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / PLAN
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        if not all(row["kind"] in ("sparse", "dense") and isinstance(row["name"], str) for row in layers):
            raise ValueError("a layer makes no sense")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, so what was decided about each layer is not known: start a new run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return layers
