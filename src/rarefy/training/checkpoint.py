"""Checkpoints of a run: one file a twin, and latest.json, which names those that belong together.

checkpoint-<twin>-<step>.safetensors holds model, pattern, optimizer, engine and its trackers, and follows from them
alone. Data order, learning rates and random draws follow from the step. Clocks are no state of the training, so they
are in latest.json, which is written last: whenever a run is killed, it names files that are whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rarefy.files import atomic_write, load_into, remove_leftovers, save
from rarefy.training.twin import Clock, Twin

LATEST = "latest.json"


def save_checkpoint(folder: Path, twins: Sequence[Twin]) -> None:
    """Write a checkpoint, then remove the one before.

    Raises:
        OSError: it could not be written, the disk is full for example. The checkpoint before it stays in force.
    """
    entries = {}
    for twin in twins:
        name = f"checkpoint-{twin.name}-{twin.step}.safetensors"
        extra = {"step": twin.step, "flops": twin.flops}
        save(twin.model, folder / name, rewirer=twin.rewirer, optimizer=twin.optimizer, extra=extra)
        entries[twin.name] = {"file": name, "step": twin.step, "clock": twin.clock.parts()}
    atomic_write(folder / LATEST, (json.dumps({"twins": entries}, indent=1) + "\n").encode())
    current = {entry["file"] for entry in entries.values()}
    for path in folder.glob("checkpoint-*.safetensors"):
        if path.name not in current:
            path.unlink()


def latest(folder: Path) -> dict[str, dict[str, Any]]:
    """Twin name -> file, step and clock of the checkpoint in force; empty: the run was stopped before its first.

    Raises:
        ValueError: latest.json is damaged.
    """
    path = folder / LATEST
    if not path.is_file():
        return {}
    try:
        twins = json.loads(path.read_text(encoding="utf-8"))["twins"]
        known = {field.name for field in fields(Clock)}
        for entry in twins.values():
            if (
                Path(entry["file"]).name != entry["file"]
                or not isinstance(entry["step"], int)
                or set(entry["clock"]) != known
            ):
                raise ValueError("an entry makes no sense")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): it should name a checkpoint a twin; restore it, or start a new run"
        ) from error
    return twins


def load_checkpoint(folder: Path, twins: Sequence[Twin]) -> None:
    """Put every twin where the checkpoint in force left it, if there is one yet; what a killed save left is removed.

    Raises:
        ValueError: a file is missing, damaged, or of another model or plan.
    """
    remove_leftovers(folder)
    entries = latest(folder)
    if not entries:
        return
    for twin in twins:
        if twin.name not in entries:
            raise ValueError(
                f"{folder / LATEST} has no checkpoint of the {twin.name} network; it has: {', '.join(entries)}"
            )
        entry, path = entries[twin.name], folder / entries[twin.name]["file"]
        try:
            found = load_into(path, twin.model, rewirer=twin.rewirer, optimizer=twin.optimizer)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing, which {folder / LATEST} names") from None
        if not isinstance(found.extra, dict) or found.extra.get("step") != entry["step"]:
            raise ValueError(
                f"{path} is not of step {entry['step']}, as {folder / LATEST} says: they do not belong together"
            )
        twin.step, twin.flops = entry["step"], int(found.extra.get("flops", 0))
        twin.clock = Clock(**entry["clock"])
