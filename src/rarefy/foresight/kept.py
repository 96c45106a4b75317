"""Step models kept beside the calibrations of layers, one file for each set of conditions."""

from __future__ import annotations

import json
from pathlib import Path

from rarefy.cost import CostModel, cache_path
from rarefy.files import atomic_write
from rarefy.foresight.steps import StepModel
from rarefy.foresight.timing import Progress, calibrate_steps, step_conditions


def steps_path() -> Path:
    """Where the step model for here and now is kept: beside the cost model."""
    costs = cache_path()
    return costs.with_name(costs.name.replace("cost-", "steps-"))


def load_steps(costs: CostModel) -> StepModel | None:
    """The one that fits here, now and this cost model; None if there is none, or the file cannot be used."""
    try:
        model = StepModel.from_json(json.loads(steps_path().read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return model if dict(model.conditions) == step_conditions(costs) else None


def step_model(costs: CostModel, *, progress: Progress = lambda text: None) -> StepModel:
    """From the cache, or calibrated, in about a minute, and kept if there is a folder to keep it in."""
    found = load_steps(costs)
    if found is None:
        found = calibrate_steps(costs, progress=progress)
        path = steps_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(found.to_json(), indent=1).encode())
        except OSError:
            pass
    return found
