"""Calibrations kept in the user's cache folder, one file for each set of conditions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rarefy.cost.calibration import calibrate
from rarefy.cost.host import conditions
from rarefy.cost.model import CostModel
from rarefy.files import atomic_write


def cache_path(given: dict[str, Any] | None = None) -> Path:
    """Where the calibration for these conditions, or those of here and now, is kept.

    In `$XDG_CACHE_HOME/rarefy`, or `~/.cache/rarefy`.
    """
    key = json.dumps(conditions() if given is None else given, sort_keys=True)
    folder = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"  # the XDG rules ignore relative paths
    return base / "rarefy" / f"cost-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_model() -> CostModel | None:
    """The calibration that fits here and now; None if there is none, or the file cannot be used."""
    here = conditions()
    try:
        model = CostModel.from_json(json.loads(cache_path(here).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return model if dict(model.conditions) == here else None


def save_model(model: CostModel) -> Path | None:
    """Keep it for later processes; None where the folder cannot be written, which loses nothing but the time."""
    path = cache_path(dict(model.conditions))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(model.to_json(), indent=1).encode())
    except OSError:
        return None
    return path


def cost_model(*, anew: bool = False, progress: Callable[[str], None] = lambda text: None) -> CostModel:
    """The model for here and now: from the cache, or calibrated, in about a minute, and kept.

    Args:
        anew: calibrate even if there is one.
        progress: told what is being timed, if anything is.
    """
    found = None if anew else load_model()
    if found is None:
        found = calibrate(progress=progress)
        save_model(found)
    return found
