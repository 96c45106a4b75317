"""Whole training steps timed: a few for the step model to be fitted on, others for it to be checked on."""

from __future__ import annotations

import datetime
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.cost import CostModel, Precision, conditions, dense_precisions, interleaved
from rarefy.foresight.shape import Shape
from rarefy.foresight.steps import StepModel, TimedStep, fit_steps, linears_ms
from rarefy.methods import Static
from rarefy.plan import Plan
from rarefy.recipes.text import TextSettings
from rarefy.recipes.text.networks import make_dense, make_sparse
from rarefy.training.twin import Twin

Progress = Callable[[str], None]

POINTS = (
    Shape(width=128, layers=2, context=256, batch=8),
    Shape(width=128, layers=2, context=256, batch=8, density=0.1),
    Shape(width=256, layers=1, context=128, batch=8),
    Shape(width=256, layers=2, context=128, batch=8, density=0.1),
    Shape(width=64, layers=4, context=64, batch=16),
    Shape(width=64, layers=4, context=64, batch=16, density=0.25),
    Shape(width=384, layers=1, context=128, batch=4),
    Shape(width=384, layers=2, context=128, batch=4, density=0.1, block=(4, 4)),
    Shape(width=128, layers=1, context=512, batch=4),
    Shape(width=128, layers=2, context=512, batch=4, density=0.1),
    Shape(width=192, layers=3, context=256, batch=2),
    Shape(width=320, layers=3, context=256, batch=2, density=0.25),
    Shape(width=256, layers=2, context=256, batch=8),
    Shape(width=256, layers=2, context=256, batch=8, density=0.25, block=(4, 4)),
    Shape(width=144, layers=4, attention=64, context=256, batch=8),
    Shape(width=208, layers=4, attention=64, context=256, batch=8, density=0.5, block=(4, 4)),
    Shape(width=320, layers=1, attention=128, context=512, batch=4),
    Shape(width=512, layers=1, attention=160, context=256, batch=4, density=0.25, block=(4, 1)),
)
"""Small and large, shallow and deep, of few tokens and of many, with attention as wide as they are and narrow: dense
and sparse in turn."""

HELD_OUT = (
    Shape(width=192, layers=4, context=256, batch=8),
    Shape(width=256, layers=4, context=256, batch=8, density=0.1),
    Shape(width=384, layers=2, context=256, batch=8, density=0.1),
    Shape(width=320, layers=2, context=256, batch=4),
    Shape(width=512, layers=2, context=128, batch=8, density=0.05, block=(4, 4)),
    Shape(width=96, layers=6, context=128, batch=8),
    Shape(width=320, layers=4, context=256, batch=4, density=0.25),
    Shape(width=448, layers=1, context=512, batch=2),
    Shape(width=224, layers=4, attention=168, context=256, batch=8),
    Shape(width=320, layers=4, attention=144, context=256, batch=8, density=0.5, block=(4, 4)),
)
"""For a check: none is among the points."""

ROUNDS = 5
"""Steps of each network that are timed, in turn; one more warms up."""


class Noise:
    """Random bytes to train on: what a step takes does not depend on them."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        self._bytes = torch.randint(256, (shape.batch, shape.context + 1), generator=generator)

    def at(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """The same at every step, as `rarefy.training.twin.StepData` has it."""
        return self._bytes[:, :-1], self._bytes[:, 1:]


def make_network(shape: Shape) -> Twin:
    """The network that `rarefy train text` would train, with a fixed pattern; nothing of it is kept."""
    block = shape.block if shape.block != (1, 1) else 1
    plan = Plan(density=min(shape.density, 0.5), block=block, method=Static(), keep_dense=("head",))
    settings = TextSettings(
        width=shape.width, layers=shape.layers, attention=shape.attention, heads=shape.heads, context=shape.context,
        batch=shape.batch, plan=plan, precision="bf16" if shape.precision == "bf16" else None, measure=False,
    ).settled(1000)  # fmt: skip
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what is wrong with so short a run says nothing of a real one
        return make_dense(settings) if shape.dense else make_sparse(settings, settings.plan)


def time_steps(
    shapes: Sequence[Shape], costs: CostModel, *, rounds: int = ROUNDS, progress: Progress = lambda text: None
) -> list[TimedStep]:
    """Medians of whole steps: data, forward, backward, clipping, optimizer; those that the cost model knows, in turn.

    On torch's threads. Two rounds of all are begun with, a round lasts as long as a step of each.
    """
    known = [(shape, ms) for shape in shapes if (ms := linears_ms(costs, shape)) is not None]
    progress(f"timing whole steps of {len(known)} small networks")
    laps = [_lap(shape) for shape, _ in known]
    for lap in laps:
        lap()
    times = interleaved([[lap] for lap in laps], budget_s=float("inf"), rounds=rounds)
    return [TimedStep(shape, ms, statistics.median(taken[0])) for (shape, ms), taken in zip(known, times, strict=True)]


def calibrate_steps(
    costs: CostModel, *, shapes: Sequence[Shape] = POINTS, progress: Progress = lambda text: None
) -> StepModel:
    """Time the points in every precision that dense layers are worth timing in here, and fit the model to them."""
    started = time.perf_counter()
    timed: list[TimedStep] = []
    for precision in step_precisions():
        timed += time_steps([replace(shape, precision=precision) for shape in shapes], costs, progress=progress)
    about = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return fit_steps(timed, conditions=step_conditions(costs), fitted=about)


def step_precisions() -> tuple[Precision, ...]:
    """What `--precision` can say and this machine computes fast."""
    return tuple(precision for precision in dense_precisions() if precision != "medium")


def step_conditions(costs: CostModel) -> dict[str, object]:
    """What a step model holds for."""
    return {**conditions(), "cost_model": costs.fitted.get("date")}


def _lap(shape: Shape) -> Callable[[], object]:
    twin, data = make_network(shape), Noise(shape)
    return lambda: twin.train_step(data, clip=1.0)
