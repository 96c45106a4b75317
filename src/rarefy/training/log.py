"""metrics.jsonl: what a run measures, one JSON object a line, written as it happens.

Kinds: run (what runs, once), train, eval, rewire and density (a layer at a step), guard (a warning), time (a twin at a
step), end. A reader may follow the file while it grows; a resumed run first cuts what came after its checkpoint, so
that the file reads as one run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rarefy.files import atomic_write

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends records to a run's metrics.jsonl. Use it in `with`, or close it."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / METRICS).open(
            "a", encoding="utf-8", buffering=1
        )  # line by line, so a kill loses no whole line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more is to come; may be called again."""
        self._file.close()

    def write(self, kind: str, **fields: Any) -> None:
        """One line; numbers that JSON has no name for become null."""
        self._file.write(json.dumps({"kind": kind, **_finite(fields)}) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def cut_log(folder: Path, steps: Mapping[str, int]) -> None:
    """Drop what each twin wrote after the step it resumes from, its end, and a last line that is not whole.

    Args:
        steps: twin name -> step of its checkpoint.
    """
    path = folder / METRICS
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "run" or (record["kind"] != "end" and record["step"] <= steps.get(record["twin"], 0)):
            kept.append(line if line.endswith("\n") else line + "\n")
    atomic_write(path, "".join(kept).encode())
