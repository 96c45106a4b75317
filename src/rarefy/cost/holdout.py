"""Predicted beside measured, on shapes, densities and numbers of tokens that the calibration never saw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.cost.host import CALIBRATED_BLOCKS
from rarefy.cost.model import CostModel, Timed, error
from rarefy.cost.precision import PRECISIONS, dense_precisions
from rarefy.cost.terms import PASSES
from rarefy.cost.trial import try_layer

HELD_OUT: tuple[tuple[tuple[int, int], float, int], ...] = (
    ((1152, 384), 0.1, 2048),
    ((384, 1536), 0.07, 1536),
    ((640, 640), 0.15, 3072),
    ((2560, 640), 0.1, 1024),
    ((896, 896), 0.04, 384),
    ((1280, 1280), 0.25, 768),
    ((1536, 3072), 0.08, 1536),
)
"""(shape, density, tokens), none of them in `rarefy.cost.calibration.POINTS`."""

WITHIN = 0.2
"""What a prediction should be within."""

POINT_S = 0.6
"""For one layer in all precisions. An error above `WITHIN` is timed again, once, and the faster time counts: other work
on the machine only ever adds to it."""


@dataclass(frozen=True)
class Check:
    """The model's predictions beside what was measured."""

    model: CostModel
    timed: list[Timed]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a layer: shape, tokens, density, structure, precision, and of each pass predicted, measured, error."""
        found = []
        for point in self.timed:
            work = point.work
            row: dict[str, Any] = {
                "shape": list(work.shape),
                "tokens": work.tokens,
                "density": work.nnz / (work.shape[0] * work.shape[1]),
                "structure": work.kind.partition(" ")[2],
                "precision": work.precision,
            }
            for which in PASSES:
                row[f"{which}_predicted_ms"] = self.model.ms(work, which)
                row[f"{which}_measured_ms"] = point.ms(which)
                row[f"{which}_error"] = error(self.model, point, which)
            found.append(row)
        return found

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Of each pass: median and greatest absolute error, and the share of layers within `WITHIN`."""
        found = {}
        for which in PASSES:
            errors = [abs(error(self.model, point, which)) for point in self.timed]
            within = sum(e <= WITHIN for e in errors) / len(errors)
            found[which] = {"median": statistics.median(errors), "worst": max(errors), "within": within}
        return found

    def __str__(self) -> str:
        head = ["shape", "tokens", "density", "structure", "precision"]
        head += ["forward: predicted", "measured ms", "error", "step: predicted", "measured ms", "error"]
        table = [head]
        for row in self.rows:
            shape, density, cells = "x".join(map(str, row["shape"])), f"{row['density']:.2f}", []
            for which in PASSES:
                cells += [f"{row[f'{which}_{name}_ms']:.2f}" for name in ("predicted", "measured")]
                cells.append(f"{row[f'{which}_error']:+.0%}")
            table.append([shape, str(row["tokens"]), density, row["structure"], row["precision"], *cells])
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "-" * len(lines[0]))
        for which, found in self.summary.items():
            lines.append(
                f"{which}: {found['within']:.0%} of {len(self.timed)} within {WITHIN:.0%}; "
                f"median error {found['median']:.0%}, worst {found['worst']:.0%}"
            )
        return "\n".join(lines)


def check(
    model: CostModel,
    *,
    points: Sequence[tuple[tuple[int, int], float, int]] = HELD_OUT,
    progress: Callable[[str], None] = lambda text: None,
) -> Check:
    """Time layers of every structure and precision that the model knows; under a minute.

    Args:
        points: (shape, density, tokens) of the layers.
        progress: told what is being timed.
    """
    timed: list[Timed] = []
    try_layer((512, 512), 512, 0.1, None, dense_precisions(), budget_s=1.0)  # threads and clock awake
    for number, (shape, density, tokens) in enumerate(points):
        progress(f"timing: {number + 1} of {len(points)} layer shapes")
        for block in (None, *CALIBRATED_BLOCKS):
            precisions = dense_precisions() if block is None else PRECISIONS
            found = try_layer(shape, tokens, density, block, precisions, budget_s=POINT_S)
            found = [point for point in found if model.knows(point.work)]
            if any(abs(error(model, point, which)) > WITHIN for point in found for which in PASSES):
                again = try_layer(shape, tokens, density, block, precisions, budget_s=POINT_S)
                found = [
                    Timed(a.work, min(a.forward_ms, b.forward_ms), min(a.step_ms, b.step_ms))
                    for a, b in zip(found, (point for point in again if model.knows(point.work)), strict=True)
                ]
            timed += found
    return Check(model, timed)
