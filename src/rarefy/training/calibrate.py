"""How long a step takes here, tried on networks that are thrown away: so a wish in minutes becomes a step count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rarefy.cost import training_bytes
from rarefy.training.twin import StepData, Twin

CHECKPOINT_SHARE = 0.01
"""Of the time, for checkpoints and logs."""

WARM_UP, FEWEST, MOST = 2, 8, 40
"""Steps of a trial: those that warm caches up and allocate, and how many are timed after them."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a few steps of a network cost. Times are lower quartiles: what else a machine does only adds."""

    step_s: float
    """Seconds of a step without a rewire."""
    rewire_s: float
    """Seconds that the rewire of one layer adds to its step, growth scan included; 0 for dense networks."""
    eval_s: float
    """Seconds of one evaluation, taken to be forward passes."""
    training_bytes: dict[str, int]
    """Bytes by part once the optimizer has its state."""

    def mixed(self, later: Trial, share: float) -> Trial:
        """What a step costs on average if it changes to what `later` says; `share` of the way, on average."""
        times = {
            name: (1 - share) * getattr(self, name) + share * getattr(later, name)
            for name in ("step_s", "rewire_s", "eval_s")
        }
        return replace(self, **times)


def try_out(
    make: Callable[[], Twin], data: StepData, *, seconds: float | None, accumulate: int, eval_batches: float
) -> Trial:
    """Make a network, take a few steps, and throw it away.

    Args:
        make: a fresh network. If it rewires, one that rewires a layer after every other step: see `Trial.rewire_s`.
        seconds: about how long to take, FEWEST steps at least; None: a single step, and the times are 0.
        accumulate: micro-batches of a step.
        eval_batches: forward passes of an evaluation.
    """
    twin = make()
    rewired: list[float] = []
    plain: list[float] = []
    forward: list[float] = []
    begun = time.monotonic()
    wanted = WARM_UP + MOST if seconds is not None else 1
    while twin.step < wanted and not (
        seconds is not None and twin.step >= WARM_UP + FEWEST and time.monotonic() - begun > seconds
    ):
        train_s, forward_s = twin.clock.train_s, twin.clock.forward_s
        result = twin.train_step(data, accumulate=accumulate, rate=0.1)
        if twin.step > WARM_UP:
            (rewired if result.rewires else plain).append(twin.clock.train_s - train_s)
            forward.append((twin.clock.forward_s - forward_s) / accumulate)
    step_s = lower_quartile(plain or rewired)
    return Trial(
        step_s=step_s,
        rewire_s=max(0.0, lower_quartile(rewired) - step_s) if rewired else 0.0,
        eval_s=eval_batches * lower_quartile(forward),
        training_bytes=training_bytes(twin.model, twin.optimizer),
    )


def lower_quartile(times: Sequence[float]) -> float:
    """What a quarter of the times stay below; 0 without any."""
    return sorted(times)[len(times) // 4] if times else 0.0


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
