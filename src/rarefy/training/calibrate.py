"""How long a step takes here, tried on networks that are thrown away: so a wish in minutes becomes a step count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from rarefy.cost import training_bytes
from rarefy.training.twin import StepData, Twin

CHECKPOINT_SHARE = 0.01
"""Of the time, for checkpoints and logs."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a few steps of a network cost."""

    step_s: float
    """Median seconds of a step without a rewire."""
    rewire_s: float
    """Seconds that the rewire of one layer adds to its step, growth scan included; 0 for dense networks."""
    eval_s: float
    """Seconds of one evaluation."""
    training_bytes: dict[str, int]
    """Bytes by part once the optimizer has its state."""


def try_out(
    make: Callable[[], Twin], data: StepData, windows: Iterable[tuple[Tensor, Tensor]], *, timed: bool, accumulate: int
) -> Trial:
    """Make a network, take a step, or about ten if `timed`, and throw it away.

    Args:
        make: a fresh network. If it rewires, one that rewires one layer after each step: see `Trial.rewire_s`.
        timed: False: a single step; the times are then 0.
    """
    twin = make()
    rewired: list[float] = []
    plain: list[float] = []
    eval_s = 0.0
    if timed:
        begun = time.perf_counter()
        twin.evaluate(windows)
        eval_s = time.perf_counter() - begun
    for number in range(10 if timed else 1):
        before = twin.clock.train_s
        result = twin.train_step(data, accumulate=accumulate, rate=0.1)
        if number >= 2:  # the first steps also warm up caches and allocate
            (rewired if result.rewires else plain).append(twin.clock.train_s - before)
    step_s = statistics.median(plain or rewired) if timed else 0.0
    extra = max(0.0, statistics.median(rewired) - step_s) if rewired and plain else 0.0
    return Trial(
        step_s=step_s, rewire_s=extra, eval_s=eval_s, training_bytes=training_bytes(twin.model, twin.optimizer)
    )


def steps_within(
    seconds: float, trials: Iterable[Trial], *, evaluations: Callable[[int], int], rewires: Callable[[int], int]
) -> int:
    """Optimizer steps of each network that fit into the time, all of them one after the other; at least one.

    Args:
        seconds: for training and evaluation together.
        trials: one a network.
        evaluations: steps of the run -> evaluations of each network in it.
        rewires: steps of the run -> rewires of layers in it.
    """
    trials = list(trials)
    step_s, rewire_s, eval_s = (
        sum(getattr(trial, name) for trial in trials) for name in ("step_s", "rewire_s", "eval_s")
    )
    spare_s = seconds * (1 - CHECKPOINT_SHARE)

    def fits(steps: int) -> bool:
        return steps * step_s + rewires(steps) * rewire_s + evaluations(steps) * eval_s <= spare_s

    low, high = 1, max(1, int(spare_s / step_s)) + 1
    while high - low > 1:  # low fits, or is 1; high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
