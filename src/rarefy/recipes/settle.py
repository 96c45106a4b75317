"""Before a run: what the plan means here, and how many steps fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from rarefy.plan import Plan
from rarefy.recipes.settings import DEFAULT_MINUTES, RunSettings
from rarefy.recipes.task import DENSE, SPARSE, Task
from rarefy.training.calibrate import Trial, steps_within, try_out
from rarefy.training.twin import Twin

REPORT_S = 4.0
"""Kept of --minutes for the report."""

TRIAL_SHARE = 0.05
"""Of --minutes, to find out what a step takes."""

AT_END = "sparse at its last density"
"""A second trial, where the density moves."""

SCHEDULE_POINTS = 200
"""The density's way is averaged over so many steps of the run."""

Say = Callable[[str], None]
"""Takes a line for people."""


def explain(task: Task, say: Say) -> dict[str, Any]:
    """What the plan means for this network on this machine, as plan.json has it."""
    settings = task.base
    model, sample = task.sample(settings)
    timed = settings.measure and settings.device == "cpu"
    if timed:
        say("timing each layer shape, sparse and dense ...")
    explanation = settings.folded_plan().explain(model, sample if timed else None, precisions=False)
    totals = explanation.totals
    say(
        f"{totals['sparse_layers']} of {totals['layers']} {task.subject.layers} are sparse, "
        f"density {totals['density']:.3g}"
    )
    if slower := [row["name"] for row in explanation.rows if "slower" in row["reason"]]:
        say(f"left dense, as sparse would be slower here: {', '.join(slower)}")
    return explanation.to_json()


def settle(task: Task, layers: list[dict[str, Any]], started: float, say: Say) -> tuple[RunSettings, dict[str, Trial]]:
    """Settings with nothing left open, and what a few steps of each network cost."""
    settings = task.base
    data, _ = task.feed(settings)
    minutes = settings.minutes if settings.minutes is not None else DEFAULT_MINUTES
    makers = _trial_makers(task, layers)
    seconds = TRIAL_SHARE * minutes * 60 / len(makers) if settings.steps is None else None
    if seconds is not None:
        say("timing a few steps ...")
    accumulate, eval_batches = settings.settled(1).loop().accumulate, task.eval_batches(settings)
    trials = {
        name: try_out(make, data, seconds=seconds, accumulate=accumulate, eval_batches=eval_batches)
        for name, make in makers.items()
    }
    at_end = trials.pop(AT_END, trials[SPARSE])
    if settings.steps is not None:
        return settings.settled(settings.steps), trials
    spare_s = minutes * 60 - (time.monotonic() - started) - REPORT_S - task.ending_s(settings, trials)

    def evaluations(steps: int) -> int:
        return -(-steps // (settings.settled(steps).eval_interval or steps))

    def rewires(steps: int) -> int:
        method = settings.settled(steps).plan.method
        end = min(method.end if method.end is not None else int(0.75 * steps), steps)
        return _num_sparse(layers) * max(0, end - method.begin) // method.interval if method.rewires else 0

    steps = 1_000
    for _ in range(3):  # how long the density is where depends on the steps, unless the method leaves its end open
        share = _share_of_end(settings.settled(steps).plan, steps)
        average = {**trials, SPARSE: trials[SPARSE].mixed(at_end, share)}
        steps = steps_within(spare_s, average.values(), evaluations=evaluations, rewires=rewires)
    pace = ", ".join(f"{name} {trial.step_s * 1e3:,.0f} ms" for name, trial in average.items())
    say(f"a step takes {pace}: {steps:,} steps of each fit into {minutes:g} minute{'' if minutes == 1 else 's'}")
    return settings.settled(steps), trials


def _trial_makers(task: Task, layers: list[dict[str, Any]]) -> dict[str, Callable[[], Twin]]:
    """Networks to try a few steps on; the sparse one rewires a layer after every other step."""
    settings = task.base
    rehearsal = settings.settled(1_000_000)
    plan = rehearsal.plan.settled(layers)
    often = dataclasses.replace(plan.method, interval=2 * max(1, _num_sparse(layers)), begin=0, end=None, stagger=True)
    restless = dataclasses.replace(rehearsal, plan=dataclasses.replace(plan, method=often))
    makers: dict[str, Callable[[], Twin]] = {SPARSE: lambda: _held(task.make(restless, dense=False), 0.0)}
    if settings.steps is None and plan.density_at(0.0) != plan.density_at(1.0):
        makers[AT_END] = lambda: _held(task.make(restless, dense=False), 1.0)
    if settings.twin:
        makers[DENSE] = lambda: task.make(rehearsal, dense=True)
    return makers


def _held(twin: Twin, progress: float) -> Twin:
    """The network with the density of that progress of its schedule, for good."""
    assert twin.rewirer is not None
    if twin.rewirer.budget is not None:
        twin.rewirer.resize(twin.rewirer.budget.counts(progress))
        twin.rewirer.budget = None
    return twin


def _share_of_end(plan: Plan, steps: int) -> float:
    """How far, on average over a run's steps, the density is on its way from its first to its last value."""
    first, last = plan.density_at(0.0), plan.density_at(1.0)
    if first == last:
        return 0.0
    method = plan.method
    end = method.end if method.end is not None else int(0.75 * steps)
    points = [steps * i / SCHEDULE_POINTS for i in range(SCHEDULE_POINTS)]
    progress = [(t - method.begin) / max(end - method.begin, 1) for t in points]
    return sum((first - plan.density_at(p)) / (first - last) for p in progress) / SCHEDULE_POINTS


def _num_sparse(layers: list[dict[str, Any]]) -> int:
    return sum(row["kind"] == "sparse" for row in layers)
