"""The calibration: about a minute of timing that the model is fitted on, once a machine."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence

from rarefy import probe
from rarefy.cost.host import CALIBRATED_BLOCKS, batching, conditions
from rarefy.cost.model import CostModel, Timed, error, fit
from rarefy.cost.points import CALIBRATED, LEAST_POINTS, Point
from rarefy.cost.precision import PRECISIONS, dense_precisions
from rarefy.cost.trial import try_layer

SECONDS = 50.0
"""Timing stops then; what was left out of the table were refinements."""

SPARSE_POINT_S, DENSE_POINT_S = 0.15, 0.2
"""For one layer in all precisions; at least three rounds are timed."""

DOUBTED = 0.2
"""A point this far above the fit is timed again: most likely something else ran meanwhile, which only adds."""

DOUBTS_S = 10.0
"""Spent on that, at most."""

Progress = Callable[[str], None]


def calibrate(
    *,
    seconds: float = SECONDS,
    points: Sequence[Point] = CALIBRATED,
    progress: Progress = lambda text: None,
) -> CostModel:
    """Time layers of every structure in every precision, on torch's threads, and fit the model to them: linear ones and
    convolutions.

    Args:
        seconds: no point is begun later, but for the first `LEAST_POINTS`.
        points: what to time.
        progress: told what is being timed.
    """
    started = time.perf_counter()
    timed: list[Timed] = []
    for number, point in enumerate(points):
        if number >= LEAST_POINTS and time.perf_counter() - started > seconds:
            break
        progress(f"calibrating: {number + 1} of {len(points)} layers")
        for block in _structures(point):
            timed += _time(point, block)
    timed = _settle_doubts(timed)
    about = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return fit(timed, l2_bytes=probe.l2_bytes(), conditions=conditions(), fitted=about, batching=batching())


def _structures(point: Point) -> tuple[tuple[int, int] | None, ...]:
    """Those worth timing: sparse convolutions that run as linear layers are of a kind that has points enough."""
    product = point.conv is not None and point.conv.is_product
    return (None,) if product else (None, *CALIBRATED_BLOCKS)


def _time(point: Point, block: tuple[int, int] | None) -> list[Timed]:
    precisions, budget_s = (dense_precisions(), DENSE_POINT_S) if block is None else (PRECISIONS, SPARSE_POINT_S)
    return try_layer(point, block, precisions, budget_s=budget_s)


def _settle_doubts(timed: list[Timed]) -> list[Timed]:
    """The same points; those that took far longer than a first fit predicts, timed again, the faster of the two.

    The worst first, for `DOUBTS_S` seconds.
    """
    started, first = time.perf_counter(), fit(timed, l2_bytes=probe.l2_bytes(), batching=batching())

    def excess(point: Timed) -> float:
        return -min(error(first, point), error(first, point, "forward"))

    settled = sorted(timed, key=excess, reverse=True)
    for number, point in enumerate(settled):
        if excess(point) < 1 - 1 / (1 + DOUBTED) or time.perf_counter() - started > DOUBTS_S:
            break
        work = point.work
        density = work.nnz / (work.shape[0] * work.shape[1])
        same = Point(work.shape, density, work.tokens, work.conv)
        (again,) = try_layer(same, work.block, [work.precision], budget_s=SPARSE_POINT_S)
        settled[number] = Timed(work, min(point.forward_ms, again.forward_ms), min(point.step_ms, again.step_ms))
    return settled
