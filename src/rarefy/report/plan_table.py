"""What was decided about each layer, as a table."""

from __future__ import annotations

import math
from typing import Any

from rarefy.report import numbers as say
from rarefy.report.read import Record, Run, number

OPEN_ROWS = 40
"""A plan of more layers than this begins folded."""


def plan_table(run: Run) -> dict[str, Any]:
    """The plan of a run that has one, as a table for the page."""
    assert run.plan is not None
    layers, totals = run.plan["layers"], run.plan["totals"]
    sparse = sum(layer.get("kind") != "dense" for layer in layers)
    asked = number(totals, "asked_density")
    summary = f"{sparse} of {len(layers)} layers sparse"
    if math.isfinite(number(totals, "density")):
        summary += f", together of density {say.percent(number(totals, 'density'))}"
        summary += f" ({say.percent(asked)} was asked for)" if math.isfinite(asked) else ""
    rows = [_row(layer) for layer in layers]
    return {
        "name": run.name,
        "summary": summary,
        "rows": rows,
        "total": _total(totals) if totals else None,
        "timed": any(math.isfinite(number(layer, "dense_ms")) for layer in layers),
        "open": len(rows) <= OPEN_ROWS,
    }


def _total(totals: Record) -> dict[str, Any]:
    """The sums, as a row: its density is that of the sparse layers, its first time that of the layers as decided."""
    row = _row({"sparse_ms": totals.get("planned_ms"), **totals, "name": "all layers"})
    return {**row, "decision": "", "reason": ""}


def _row(layer: Record) -> dict[str, Any]:
    shape, block = layer.get("shape"), layer.get("block")
    density, speedup = number(layer, "density"), number(layer, "speedup")
    stored, dense_bytes = number(layer, "bytes"), number(layer, "dense_bytes")
    blocked = isinstance(block, list) and block not in ([1, 1], []) and layer.get("kind") != "dense"
    return {
        "name": str(layer.get("name", "?")),
        "shape": " × ".join(str(size) for size in shape) if isinstance(shape, list) else "",
        "block": "×".join(str(size) for size in block) if blocked and isinstance(block, list) else "",
        "density": say.percent(density),
        "bar": min(100.0, max(0.0, 100 * density)) if math.isfinite(density) else None,
        "nnz": say.count(number(layer, "nnz")),
        "bytes": say.nbytes(stored),
        "of_dense": say.percent(stored / dense_bytes) if dense_bytes > 0 else say.DASH,
        "flops": say.count(number(layer, "flops")),
        "sparse_ms": say.milliseconds(number(layer, "sparse_ms")),
        "dense_ms": say.milliseconds(number(layer, "dense_ms")),
        "speedup": say.times(speedup),
        "slower": speedup < 1,
        "decision": "dense" if layer.get("kind") == "dense" else "sparse",
        "reason": str(layer.get("reason") or ""),
    }
