"""The loop: twins train in turn, a slice of steps each, on the same data, with the same evaluations and schedules.

Schedules and intervals see steps, never clocks; only the time of a checkpoint follows the clock, and changes no result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rarefy.schedules import Cosine
from rarefy.training.checkpoint import save_checkpoint
from rarefy.training.interrupt import Interrupted, StopRequest
from rarefy.training.log import MetricsLog
from rarefy.training.subject import BITS_PER_BYTE, Metric
from rarefy.training.twin import Diverged, StepData, StepResult, Twin

LAST_RATE = 0.1
"""Learning rate at the end of the run, over its full rate."""

LOGGED_STEPS = 2000
"""A run logs about so many training records a twin at most."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know."""

    steps: int
    """Optimizer steps of each twin."""
    warmup: int
    """Steps over which the learning rate rises from 0."""
    eval_interval: int
    """Steps between two evaluations; there is one after the last step too."""
    tokens_per_step: int
    """Bytes or images that an optimizer step learns from."""
    accumulate: int = 1
    """Micro-batches of an optimizer step."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    slice_steps: int = 5
    """Steps that a twin takes before it is the other's turn."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints."""

    def rate(self, step: int) -> float:
        """Factor on the learning rate for step 1, ..., steps: a straight rise, then half a cosine to LAST_RATE."""
        if step <= self.warmup:
            return step / self.warmup
        return Cosine(1.0, LAST_RATE)((step - self.warmup) / max(1, self.steps - self.warmup))


class Watcher(Protocol):
    """Someone who looks on: the live line."""

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step."""
        ...

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation; mean nats. `twin.assessed` has all that it found."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A run on its way through the steps. `run` returns when all twins have taken theirs."""

    twins: Sequence[Twin]
    train_data: StepData
    valid_data: Iterable[tuple[Tensor, Tensor]]
    settings: LoopSettings
    flops_per_token: Callable[[Twin], int]
    """FLOPs of training on one token as the twin is now, forward and backward."""
    folder: Path
    """Where checkpoints go."""
    log: MetricsLog
    watcher: Watcher
    metric: Metric = BITS_PER_BYTE
    """What the log says beside a loss."""

    def run(self, stop: StopRequest) -> None:
        """Train until the last step.

        Raises:
            Interrupted: asked to stop; the step was finished and everything saved.
            Diverged: a loss, gradient or parameter is not a number; the last checkpoint, from before, is untouched.
            OSError: a checkpoint could not be written; the one before is untouched.
        """
        with self.on_the_way():
            saved_at = time.monotonic()
            while not self.done:
                self.take_slice(stop)
                if time.monotonic() - saved_at >= self.settings.checkpoint_s:
                    self.save()
                    saved_at = time.monotonic()
            self.finish()

    @property
    def done(self) -> bool:
        """Whether all twins have taken all steps."""
        return all(twin.step >= self.settings.steps for twin in self.twins)

    @contextmanager
    def on_the_way(self) -> Iterator[None]:
        """Around slices: what ends a run before its last step is logged, and saved where there is something to save."""
        try:
            yield
        except Interrupted:
            self.save()
            self._end("interrupted")
            raise
        except Diverged:
            self._end("diverged")
            raise

    def take_slice(self, stop: StopRequest) -> None:
        """The next slice of every twin, in turn. Whoever is behind, after an interrupted slice, catches up first.

        Raises:
            Interrupted, Diverged: as `run`, but nothing is saved: to be called in `on_the_way`.
        """
        every = self.settings.slice_steps
        behind = min(twin.step for twin in self.twins)
        goal = min((behind // every + 1) * every, self.settings.steps)
        for twin in self.twins:
            while twin.step < goal:
                self._step(twin)
                if stop.asked:
                    raise Interrupted

    def finish(self) -> None:
        """After the last step."""
        self.save()
        self._end("steps")

    def save(self) -> None:
        """A checkpoint of all twins, unless a parameter is not a number.

        Raises:
            Diverged: one is not, so that the last good checkpoint stays.
        """
        for twin in self.twins:
            if not twin.is_finite():
                raise Diverged(f"the {twin.name} network has parameters that are not numbers after step {twin.step:,}")
        save_checkpoint(self.folder, self.twins)

    def _step(self, twin: Twin) -> None:
        settings = self.settings
        rate = settings.rate(twin.step + 1)
        before_s = twin.clock.train_s
        flops = settings.tokens_per_step * self.flops_per_token(twin)
        result = twin.train_step(self.train_data, rate=rate, accumulate=settings.accumulate, clip=settings.clip)
        twin.flops += flops  # with the weights that the step had: its own rewires come after it
        about = {"twin": twin.name, "step": twin.step}
        tokens = twin.step * settings.tokens_per_step
        progress = {"train_s": twin.clock.train_s, "flops": twin.flops}
        if twin.step % max(1, settings.steps // LOGGED_STEPS) == 0 or twin.step == settings.steps:
            self.log.write(
                "train",
                **about,
                loss=result.loss,
                **self.metric.logged(result.loss),
                lr=max(twin.rates) * rate,
                grad_norm=result.grad_norm,
                tokens=tokens,
                **progress,
                tokens_per_s=settings.tokens_per_step / (twin.clock.train_s - before_s),
                churn=result.churn,
                density=twin.density,
            )
            self.log.write("time", **about, **twin.clock.parts())
        for record in result.rewires:
            self.log.write(**{**record, **about})
        for record in result.guards:
            self.log.write("guard", **{**record, **about})
        self.watcher.stepped(twin, result)
        if twin.step % settings.eval_interval == 0 or twin.step == settings.steps:
            found = twin.assess(self.valid_data)
            loss = found["loss"]
            self.log.write("eval", **about, **progress, **found, **self.metric.logged(loss))
            self.watcher.evaluated(twin, loss)

    def _end(self, reason: str) -> None:
        for twin in self.twins:
            self.log.write("end", twin=twin.name, step=twin.step, reason=reason)
