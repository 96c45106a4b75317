"""Predicted beside measured, on layers, densities and numbers of tokens that the calibration never saw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rarefy.cost.host import CALIBRATED_BLOCKS
from rarefy.cost.model import CostModel, Timed, error
from rarefy.cost.points import HELD_OUT, Point
from rarefy.cost.precision import PRECISIONS, dense_precisions
from rarefy.cost.trial import try_layer
from rarefy.cost.work import PASSES, Pass

WITHIN = 0.2
"""What a prediction should be within."""

POINT_S = 0.4
"""For one layer in all precisions."""

TRIES = 2
"""How often a layer that took far longer than predicted is timed again. The fastest time counts: other work on the
machine only ever adds to it. One that was faster than predicted stays as it is."""

Family = Literal["linear", "convolution"]


@dataclass(frozen=True)
class Check:
    """The model's predictions beside what was measured."""

    model: CostModel
    timed: list[Timed]
    again: int = 0
    """How many layers were timed again (see `TRIES`)."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a layer: layer (in words), shape, images (N, C, H, W; None: a linear layer), tokens, density, structure,
        precision, and of each pass predicted, measured, error.
        """
        found = []
        for point in self.timed:
            work = point.work
            row: dict[str, Any] = {
                "layer": work.name,
                "images": None if work.conv is None else list(work.conv.images),
                "shape": list(work.shape),
                "tokens": work.tokens,
                "density": work.nnz / (work.shape[0] * work.shape[1]),
                "structure": work.structure,
                "precision": work.precision,
            }
            for which in PASSES:
                row[f"{which}_predicted_ms"] = self.model.ms(work, which)
                row[f"{which}_measured_ms"] = point.ms(which)
                row[f"{which}_error"] = error(self.model, point, which)
            found.append(row)
        return found

    @property
    def summary(self) -> dict[Family, dict[Pass, dict[str, float]]]:
        """Of linear layers, of convolutions, and of each pass: median and greatest absolute error, the share of layers
        within `WITHIN`, and how many layers there are. A family of none is left out.
        """
        found: dict[Family, dict[Pass, dict[str, float]]] = {}
        for family in get_args(Family):
            timed = [point for point in self.timed if _family(point) == family]
            for which in PASSES if timed else ():
                errors = [abs(error(self.model, point, which)) for point in timed]
                within = sum(e <= WITHIN for e in errors) / len(errors)
                about = {"median": statistics.median(errors), "worst": max(errors), "within": within}
                found.setdefault(family, {})[which] = {**about, "layers": len(errors)}
        return found

    def __str__(self) -> str:
        head = ["layer", "tokens", "density", "structure", "precision"]
        head += ["forward: predicted", "measured ms", "error", "step: predicted", "measured ms", "error"]
        table = [head]
        for row in self.rows:
            cells = []
            for which in PASSES:
                cells += [f"{row[f'{which}_{name}_ms']:.2f}" for name in ("predicted", "measured")]
                cells.append(f"{row[f'{which}_error']:+.0%}")
            about = [row["layer"], str(row["tokens"]), f"{row['density']:.2f}", row["structure"], row["precision"]]
            table.append([*about, *cells])
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "-" * len(lines[0]))
        for family, passes in self.summary.items():
            for which, found in passes.items():
                lines.append(
                    f"{_NAMES[family]}, {which}: {found['within']:.0%} of {found['layers']} within {WITHIN:.0%}; "
                    f"median error {found['median']:.0%}, worst {found['worst']:.0%}"
                )
        if self.again:
            lines.append(f"{self.again} layers took far longer than predicted at first and were timed again")
        return "\n".join(lines)


_NAMES: dict[Family, str] = {"linear": "linear layers", "convolution": "convolutions"}


def _family(point: Timed) -> Family:
    return "linear" if point.work.conv is None else "convolution"


def check(
    model: CostModel,
    *,
    points: Sequence[Point] = HELD_OUT,
    progress: Callable[[str], None] = lambda text: None,
) -> Check:
    """Time layers of every structure and precision that the model knows; two minutes or three.

    Args:
        points: the layers.
        progress: told what is being timed.
    """
    layers = [(point, block) for point in points for block in (None, *CALIBRATED_BLOCKS)]
    try_layer(Point((512, 512), 0.1, 512), None, dense_precisions(), budget_s=1.0)  # threads and clock awake
    found: dict[int, list[Timed]] = {}
    for number, (point, block) in enumerate(layers):
        if number % (1 + len(CALIBRATED_BLOCKS)) == 0:
            progress(f"timing: {number // (1 + len(CALIBRATED_BLOCKS)) + 1} of {len(points)} layers")
        found[number] = _time(model, point, block)
    doubted: set[int] = set()
    for _ in range(TRIES):  # at the end, when what disturbed the first time may be over
        slow = [number for number, timed in found.items() if any(_far_above(model, t) for t in timed)]
        doubted |= set(slow)
        if slow:
            progress(f"timing again {len(slow)} that took far longer than predicted")
        for number in slow:
            again = _time(model, *layers[number])
            found[number] = [
                Timed(a.work, min(a.forward_ms, b.forward_ms), min(a.step_ms, b.step_ms))
                for a, b in zip(found[number], again, strict=True)
            ]
    return Check(model, [point for timed in found.values() for point in timed], len(doubted))


def _time(model: CostModel, point: Point, block: tuple[int, int] | None) -> list[Timed]:
    precisions = dense_precisions() if block is None else PRECISIONS
    found = try_layer(point, block, precisions, budget_s=POINT_S)
    return [timed for timed in found if model.knows(timed.work)]


def _far_above(model: CostModel, timed: Timed) -> bool:
    """Whether it took longer than a prediction that is within `WITHIN` allows."""
    return any(error(model, timed, which) < -WITHIN for which in PASSES)
