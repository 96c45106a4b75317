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

POINT_S = 0.4
"""For one layer in all precisions."""

TRIES = 2
"""How often a layer that took far longer than predicted is timed again. The fastest time counts: other work on the
machine only ever adds to it. One that was faster than predicted stays as it is."""

Point = tuple[tuple[int, int], float, int]


@dataclass(frozen=True)
class Check:
    """The model's predictions beside what was measured."""

    model: CostModel
    timed: list[Timed]
    again: int = 0
    """How many layers were timed again (see `TRIES`)."""

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
        if self.again:
            lines.append(f"{self.again} layers took far longer than predicted at first and were timed again")
        return "\n".join(lines)


def check(
    model: CostModel,
    *,
    points: Sequence[Point] = HELD_OUT,
    progress: Callable[[str], None] = lambda text: None,
) -> Check:
    """Time layers of every structure and precision that the model knows; under a minute.

    Args:
        points: (shape, density, tokens) of the layers.
        progress: told what is being timed.
    """
    layers = [(point, block) for point in points for block in (None, *CALIBRATED_BLOCKS)]
    try_layer((512, 512), 512, 0.1, None, dense_precisions(), budget_s=1.0)  # threads and clock awake
    found: dict[int, list[Timed]] = {}
    for number, (point, block) in enumerate(layers):
        if number % (1 + len(CALIBRATED_BLOCKS)) == 0:
            progress(f"timing: {number // (1 + len(CALIBRATED_BLOCKS)) + 1} of {len(points)} layer shapes")
        found[number] = _time(model, point, block)
    doubted: set[int] = set()
    for _ in range(TRIES):  # at the end, when what disturbed the first time may be over
        slow = [number for number, timed in found.items() if any(_far_above(model, t) for t in timed)]
        doubted |= set(slow)
        for number in slow:
            progress("timing again what took far longer than predicted")
            again = _time(model, *layers[number])
            found[number] = [
                Timed(a.work, min(a.forward_ms, b.forward_ms), min(a.step_ms, b.step_ms))
                for a, b in zip(found[number], again, strict=True)
            ]
    return Check(model, [point for timed in found.values() for point in timed], len(doubted))


def _time(model: CostModel, point: Point, block: tuple[int, int] | None) -> list[Timed]:
    shape, density, tokens = point
    precisions = dense_precisions() if block is None else PRECISIONS
    found = try_layer(shape, tokens, density, block, precisions, budget_s=POINT_S)
    return [timed for timed in found if model.knows(timed.work)]


def _far_above(model: CostModel, timed: Timed) -> bool:
    """Whether it took longer than a prediction that is within `WITHIN` allows."""
    return any(error(model, timed, which) < -WITHIN for which in PASSES)
