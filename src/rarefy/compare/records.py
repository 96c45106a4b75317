"""What is kept of a run: a small JSON file, which follows from the run's log and its last state.

All that follows the clock or names the machine is under "clock"; the rest is the same whenever and however often
interrupted the run was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from rarefy.compare.jobs import FORMAT, Job
from rarefy.cost import training_bytes
from rarefy.files import atomic_write
from rarefy.recipes.task import Task
from rarefy.training.machine import machine
from rarefy.training.twin import Clock, Twin

RECORDS = "runs"
"""Folder of the records, in the comparison's."""

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"


def start_of(task: Task, twin: Twin) -> dict[str, Any]:
    """What a record says of a network before its first step."""
    layers = twin.rewirer.layers if twin.rewirer else {}
    return {
        "nonzeros": num_nonzeros(twin),
        "density": twin.density,
        "flops_per_token": task.flops_per_token(twin.model),
        "layers": {
            name: {
                "size": layer.out_features * layer.in_features,
                "unit": layer.block[0] * layer.block[1],
                "units": layer.num_units,
            }
            for name, layer in layers.items()
        },
    }


def num_nonzeros(twin: Twin) -> int:
    """Numbers that exist and train."""
    return sum(p.numel() for p in twin.model.parameters())


def make_record(
    task: Task,
    job: Job,
    start: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    twin: Twin,
    *,
    state: str,
    message: str = "",
    file_bytes: int | None = None,
    judged: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The record of a run that has ended.

    Args:
        start: `start_of` the same network.
        log: records of metrics.jsonl.
        twin: as it is now.
        state: FINISHED or DIVERGED.
        file_bytes: of the network, saved.
        judged: what was found on all held-out data, where that is more than evaluations look at.
    """
    tokens = job.settings.tokens_per_step
    evals = [record for record in log if record["kind"] == "eval"]
    changes = [record for record in log if "num_units" in record and "layer" in record]
    flops, scanned = flops_at([record["step"] for record in evals] + [twin.step], start, changes, tokens)
    key = task.metric.key
    return {
        **about(task, job),
        "state": state,
        "message": message,
        "steps_taken": twin.step,
        "nonzeros": [start["nonzeros"], num_nonzeros(twin)],
        "density": [start["density"], twin.density],
        "flops_per_token": [start["flops_per_token"], task.flops_per_token(twin.model)],
        "training_bytes": training_bytes(twin.model, twin.optimizer),
        "file_bytes": file_bytes,
        "flops": flops[-1],
        "rewire_flops": scanned,
        "final": (judged or evals[-1])[key] if evals and state == FINISHED else None,
        "curve": {
            "step": [record["step"] for record in evals],
            "flops": flops[:-1],
            "loss": [record["loss"] for record in evals],
            **({key: [record[key] for record in evals]} if key != "loss" else {}),
        },
        "pattern": pattern_figures(start, changes, twin),
        "warnings": [{k: v for k, v in record.items() if k not in ("kind", "twin")} for record in log
                     if record["kind"] == "guard"],
        "clock": clock_figures(twin.clock, twin.step, [record["train_s"] for record in evals], log),
    }  # fmt: skip


def failed_record(task: Task, job: Job, message: str) -> dict[str, Any]:
    """The record of a run that broke, which is tried again next time."""
    return {**about(task, job), "state": FAILED, "message": message, "clock": _when()}


def about(task: Task, job: Job) -> dict[str, Any]:
    """What defines a run, in a record."""
    return {
        "format": FORMAT,
        "digest": job.digest,
        "label": job.label,
        "task": task.name,
        "data": {"name": task.data.name, "digest": task.data.digest},
        "dense": job.dense,
        "seed": job.seed,
        "steps": job.steps,
        "settings": job.defines["settings"],
        "metric": task.metric.key,
    }


def flops_at(
    steps: Sequence[int], start: Mapping[str, Any], changes: Sequence[Mapping[str, Any]], tokens: int
) -> tuple[list[int], int]:
    """FLOPs of training up to each of ascending steps, and those of them that were spent on dense gradients for growth.

    Args:
        changes: the engine's records of rewires and changes of density, each with the number of units from then on.
    """
    units = {name: layer["units"] for name, layer in start["layers"].items()}
    a_token, at, total, scanned = start["flops_per_token"], 0, 0, 0
    found: list[int] = []
    left = sorted(changes, key=lambda record: record["step"])
    for step in steps:
        while left and left[0]["step"] <= step:
            record = left.pop(0)
            total, at = total + (record["step"] - at) * tokens * a_token, record["step"]
            layer = start["layers"].get(record["layer"])
            if layer is None:
                continue
            a_token += 6 * layer["unit"] * (record["num_units"] - units[record["layer"]])
            units[record["layer"]] = record["num_units"]
            if record.get("grown_by") == "gradient":
                scanned += 2 * layer["size"] * tokens
        total, at = total + (step - at) * tokens * a_token, step
        found.append(total + scanned)
    return found, scanned


def pattern_figures(
    start: Mapping[str, Any], changes: Sequence[Mapping[str, Any]], twin: Twin
) -> dict[str, Any] | None:
    """What the pattern did, over all sparse layers; None for a dense network.

    exploration: share of the units that were ever active, weighted by size; churn: mean share replaced at a rewire;
    changes: of any kind, rewires and densities that moved; empty_rows, empty_cols: at the end.
    """
    if twin.rewirer is None:
        return None
    rewires = [record for record in changes if record["kind"] == "rewire"]
    last = {record["layer"]: record for record in changes}
    sizes = {name: layer["size"] for name, layer in start["layers"].items()}
    seen = {
        name: _number(last[name].get("exploration")) if name in last else layer["units"] * layer["unit"] / layer["size"]
        for name, layer in start["layers"].items()
    }
    return {
        "rewires": len(rewires),
        "changes": len(changes),
        "changed": sum(record["changed"] for record in rewires),
        "churn": fmean(record["churn"] for record in rewires) if rewires else 0.0,
        "exploration": sum(seen[name] * sizes[name] for name in sizes) / max(1, sum(sizes.values())),
        "newborn_survival": _mean(record.get("newborn_survival") for record in rewires),
        "empty_rows": sum(record.get("empty_rows") or 0 for record in last.values()),
        "empty_cols": sum(record.get("empty_cols") or 0 for record in last.values()),
        "skipped": twin.rewirer.skipped,
    }


def clock_figures(
    clock: Clock, steps: int, at_evals: Sequence[float], log: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Times of training, evaluations and checkpoints left out; when and where.

    rewire_s: choosing and moving, without the scan for growth candidates, which is part of the backward pass.
    """
    return {
        "train_s": clock.train_s,
        **clock.parts(),
        "step_s": clock.train_s / steps if steps else None,
        "rewire_share": clock.rewire_s / clock.train_s if clock.train_s else None,
        "curve_s": list(at_evals),
        **_when(),
    }


def _when() -> dict[str, Any]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}


def _number(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else 0.0


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# -- files ----------------------------------------------------------------------------------------------------------


def write_record(folder: Path, job: Job, record: Mapping[str, Any]) -> None:
    """Whole or not at all; one of the same run under another label, or that failed, is replaced."""
    (folder / RECORDS).mkdir(exist_ok=True)
    path = folder / RECORDS / job.file
    atomic_write(path, (json.dumps(record, indent=1) + "\n").encode())
    for other in (folder / RECORDS).glob(f"*-{job.digest}.json"):
        if other != path:
            other.unlink()


def find_record(folder: Path, digest: str) -> dict[str, Any] | None:
    """The record of a run, if it has been made.

    Raises:
        ValueError: it is damaged.
    """
    for path in sorted((folder / RECORDS).glob(f"*-{digest}.json")):
        return read_record(path)
    return None


def read_record(path: Path) -> dict[str, Any]:
    """Raises ValueError, with what to do, when the file is no record of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["state"] not in (FINISHED, DIVERGED, FAILED):
            raise ValueError("it is of another format")
        if record["state"] == FINISHED and not (record["clock"]["train_s"] > 0 and record["curve"]["step"]):
            raise ValueError("it has no times or evaluations")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the run is made again") from error
    return record
