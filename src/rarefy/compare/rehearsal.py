"""What a step of each contender costs, found in rehearsals that are thrown away.

A rehearsal is a contender's whole run in few steps, so that one whose density moves passes through all of its
densities. Rehearsals take turns, so that whatever disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rarefy.compare.contenders import Contender
from rarefy.recipes.task import Task
from rarefy.training.twin import Diverged, Twin

REHEARSAL = 48
"""Steps of a rehearsal, at least."""
REWIRES = 12
"""A rehearsal's layers rewire together after every twelfth of it."""
TURNS = 48
"""Turns that a rehearsal takes its steps in."""
WARM_UP = 3
"""First steps, which allocate and warm caches up: not timed."""
PART = 12
"""A rehearsal's time is the mean over parts of so many steps of the median in each: a hiccup counts for nothing, and a
minute in which the machine is slow for what it is."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a rehearsal found. FLOPs follow from the settings alone, times from the machine."""

    step_s: float
    """Mean seconds of a step without a rewire."""
    rewire_s: float
    """Mean seconds that the rewire of one layer adds, growth scan included."""
    step_flops: float
    """Mean FLOPs of a step without a rewire."""
    rewire_flops: float
    """Mean FLOPs of the dense gradient that the rewire of one layer scans; 0 where growth needs none."""
    layers: int
    """Sparse layers."""


def rehearse(task: Task, contenders: Sequence[Contender], steps: Mapping[str, int] | None = None) -> dict[str, Pace]:
    """Label -> pace, all measured in turn: whoever has come least far takes the next few steps.

    Args:
        steps: label -> steps of the rehearsal, `REHEARSAL` at least; None: so many for all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with so short a run says nothing of the real one
        rehearsals = {
            one.label: _Rehearsal(task, one, REHEARSAL if steps is None else steps[one.label]) for one in contenders
        }
        going = list(rehearsals.values())
        while going:
            rehearsal = min(going, key=lambda one: one.progress)
            rehearsal.take_turn()
            if rehearsal.progress >= 1:
                going.remove(rehearsal)
    return {label: rehearsal.pace() for label, rehearsal in rehearsals.items()}


class _Rehearsal:
    """One contender's, turn by turn.

    Attributes:
        progress: share of the steps that it has taken; 1 once it is over.
    """

    def __init__(self, task: Task, contender: Contender, steps: int) -> None:
        settings = contender.settled(0, steps)
        if not contender.dense:
            method = dataclasses.replace(
                settings.plan.method, interval=steps // REWIRES, begin=0, end=None, stagger=False
            )
            settings = dataclasses.replace(settings, plan=dataclasses.replace(settings.plan, method=method))
        self.progress = 0.0
        self._steps = steps
        self._task, self._loop = task, settings.loop()
        self._twin: Twin = task.make(settings, dense=contender.dense)
        self._data, _ = task.feed(settings)
        self._plain: list[tuple[int, float]] = []
        self._rewired: list[tuple[int, float, int]] = []
        """(step, seconds, layers)."""
        self._scans = False
        """Whether growth looked at dense gradients."""
        self._flops: list[int] = []

    def take_turn(self) -> None:
        """The next steps, or none if it has diverged: its runs will say so; what it took until then is its pace."""
        goal = min(self._twin.step + self._steps // TURNS, self._steps)
        try:
            while self._twin.step < goal:
                self._step()
            self.progress = self._twin.step / self._steps
        except Diverged:
            self.progress = 1.0

    def _step(self) -> None:
        twin, loop = self._twin, self._loop
        before = twin.clock.train_s
        self._flops.append(loop.tokens_per_step * self._task.flops_per_token(twin.model))
        rate = loop.rate(twin.step + 1)
        result = twin.train_step(self._data, rate=rate, accumulate=loop.accumulate, clip=loop.clip)
        taken = twin.clock.train_s - before
        if result.rewires:
            self._rewired.append((twin.step, taken, len(result.rewires)))
            self._scans |= any(record.get("grown_by") == "gradient" for record in result.rewires)
        else:
            self._plain.append((twin.step, taken))

    def pace(self) -> Pace:
        """What it found."""
        parts: dict[int, list[float]] = {}
        timed = [(step, taken) for step, taken in self._plain if step > WARM_UP] or self._plain or [(1, 1.0)]
        for step, taken in timed:
            parts.setdefault((step - 1) // PART, []).append(taken)
        by_part = {part: median(times) for part, times in parts.items()}
        step_s = fmean(by_part.values())
        extra = [
            (taken - by_part.get((step - 1) // PART, step_s)) / layers
            for step, taken, layers in self._rewired
            if step > WARM_UP
        ]
        layers = list(self._twin.rewirer.layers.values()) if self._twin.rewirer else []
        scanned = 0.0
        if self._scans:
            size = fmean(layer.out_features * layer.in_features for layer in layers)
            scanned = 2 * size * self._loop.tokens_per_step
        return Pace(
            step_s=step_s,
            rewire_s=max(0.0, median(extra)) if extra else 0.0,
            step_flops=fmean(self._flops),
            rewire_flops=scanned,
            layers=len(layers),
        )
