"""The calibration: under a minute of timing that the model is fitted on, once a machine."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence

from rarefy import probe
from rarefy.cost.host import CALIBRATED_BLOCKS, conditions
from rarefy.cost.model import CostModel, Timed, error, fit
from rarefy.cost.precision import PRECISIONS, dense_precisions
from rarefy.cost.trial import try_layer

SECONDS = 45.0
"""Timing stops then; what was left out of the table below were refinements."""

POINTS: tuple[tuple[tuple[int, int], float, int], ...] = (
    ((1024, 1024), 0.1, 2048),
    ((256, 256), 0.1, 256),
    ((512, 2048), 0.05, 2048),
    ((2048, 512), 0.05, 2048),
    ((512, 512), 0.3, 1024),
    ((1024, 1024), 0.02, 512),
    ((4096, 1024), 0.1, 2048),
    ((1024, 4096), 0.1, 2048),
    ((256, 1024), 0.1, 128),
    ((1024, 512), 0.1, 256),
    ((768, 3072), 0.2, 1024),
    ((512, 512), 0.1, 4096),
    ((1536, 512), 0.5, 512),
    ((768, 768), 0.05, 512),
    ((1024, 256), 0.02, 2048),
    ((3072, 768), 0.2, 1024),
    ((2048, 2048), 0.1, 256),
    ((1792, 768), 0.15, 640),
    ((2048, 2048), 0.02, 1024),
    ((640, 512), 0.2, 320),
)
"""(shape, density, tokens), the most telling first: small and large, wide and tall, thin and full, of few tokens."""

LEAST_POINTS = 10
"""Of each structure, whatever the time: no more terms than points."""

SPARSE_POINT_S, DENSE_POINT_S = 0.2, 0.25
"""For one layer in all precisions; at least three rounds are timed."""

DOUBTED = 0.2
"""A point this far above the fit is timed again: most likely something else ran meanwhile, which only adds."""

Progress = Callable[[str], None]


def calibrate(
    *,
    seconds: float = SECONDS,
    points: Sequence[tuple[tuple[int, int], float, int]] = POINTS,
    progress: Progress = lambda text: None,
) -> CostModel:
    """Time layers of every structure in every precision, on torch's threads, and fit the model to them.

    Args:
        seconds: no point of the table is begun later, unless a structure has fewer than `LEAST_POINTS`.
        points: what to time.
        progress: told what is being timed.
    """
    started = time.perf_counter()
    structures = (None, *CALIBRATED_BLOCKS)
    timed: list[Timed] = []
    for number, point in enumerate(points):
        if number >= LEAST_POINTS and time.perf_counter() - started > seconds:
            break
        progress(f"calibrating: {number + 1} of {len(points)} layer shapes")
        for block in structures:
            timed += _time(point, block)
    timed = _settle_doubts(timed)
    about = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return fit(timed, l2_bytes=probe.l2_bytes(), conditions=conditions(), fitted=about)


def _time(point: tuple[tuple[int, int], float, int], block: tuple[int, int] | None) -> list[Timed]:
    shape, density, tokens = point
    precisions, budget_s = (dense_precisions(), DENSE_POINT_S) if block is None else (PRECISIONS, SPARSE_POINT_S)
    return try_layer(shape, tokens, density, block, precisions, budget_s=budget_s)


def _settle_doubts(timed: list[Timed]) -> list[Timed]:
    """The same points; those that took far longer than a first fit predicts, timed again, the faster of the two."""
    first = fit(timed, l2_bytes=probe.l2_bytes())
    settled = []
    for point in timed:
        if error(first, point) < 1 / (1 + DOUBTED) - 1 or error(first, point, "forward") < 1 / (1 + DOUBTED) - 1:
            work = point.work
            density = work.nnz / (work.shape[0] * work.shape[1])
            (again,) = try_layer(
                work.shape, work.tokens, density, work.block, [work.precision], budget_s=SPARSE_POINT_S
            )
            point = Timed(work, min(point.forward_ms, again.forward_ms), min(point.step_ms, again.step_ms))
        settled.append(point)
    return settled
