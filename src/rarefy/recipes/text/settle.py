"""Before a run: what the plan means here, and how many steps fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from rarefy.models import GPT
from rarefy.plan import Plan
from rarefy.recipes.text.networks import DENSE, SPARSE, make_dense, make_sparse, settled_plan
from rarefy.recipes.text.settings import DEFAULT_MINUTES, TextSettings
from rarefy.training.batches import Batches, Windows
from rarefy.training.calibrate import Trial, steps_within, try_out
from rarefy.training.data import Corpus
from rarefy.training.twin import Twin

REPORT_S = 4.0
"""Kept of --minutes for the report."""

TRIAL_SHARE = 0.05
"""Of --minutes, to find out what a step takes."""

TOKENS_TO_MEASURE = 2048
"""Layers are timed on so many rows of input, rounded up to whole windows, or on a micro-batch where that is smaller."""

AT_END = "sparse at its last density"
"""A second trial, where the density moves."""

SCHEDULE_POINTS = 200
"""The density's way is averaged over so many steps of the run."""

Say = Callable[[str], None]
"""Takes a line for people."""


def explain(settings: TextSettings, say: Say) -> dict[str, Any]:
    """What the plan means for this network on this machine, as plan.json has it."""
    model, plan = GPT(settings.gpt()), settings.folded_plan()
    sample = None
    if settings.measure and settings.device == "cpu":
        say("timing each layer shape, sparse and dense ...")
        rows = min(settings.batch, -(-TOKENS_TO_MEASURE // settings.context))
        sample = torch.zeros(rows, settings.context, dtype=torch.int64)
    explanation = plan.explain(model, sample, precisions=False)
    totals = explanation.totals
    say(f"{totals['sparse_layers']} of {totals['layers']} linear layers are sparse, density {totals['density']:.3g}")
    if slower := [row["name"] for row in explanation.rows if "slower" in row["reason"]]:
        say(f"left dense, as sparse would be slower here: {', '.join(slower)}")
    return explanation.to_json()


def settle(
    settings: TextSettings, layers: list[dict[str, Any]], corpus: Corpus, started: float, say: Say
) -> tuple[TextSettings, dict[str, Trial]]:
    """Settings with nothing left open, and what a few steps of each network cost."""
    data, windows = batches(settings, corpus)
    minutes = settings.minutes if settings.minutes is not None else DEFAULT_MINUTES
    makers = _trial_makers(settings, layers)
    seconds = TRIAL_SHARE * minutes * 60 / len(makers) if settings.steps is None else None
    if seconds is not None:
        say("timing a few steps ...")
    eval_batches = -(-windows.num_windows // settings.batch)
    trials = {
        name: try_out(make, data, seconds=seconds, accumulate=settings.accumulate, eval_batches=eval_batches)
        for name, make in makers.items()
    }
    at_end = trials.pop(AT_END, trials[SPARSE])
    if settings.steps is not None:
        return settings.settled(settings.steps), trials
    writing_s = trials[SPARSE].eval_s * settings.sample_bytes * settings.context / settings.eval_bytes
    spare_s = minutes * 60 - (time.monotonic() - started) - REPORT_S - writing_s

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


def _trial_makers(settings: TextSettings, layers: list[dict[str, Any]]) -> dict[str, Callable[[], Twin]]:
    """Networks to try a few steps on; the sparse one rewires a layer after every other step."""
    rehearsal = settings.settled(1_000_000)
    plan = settled_plan(rehearsal.plan, layers)
    often = dataclasses.replace(plan.method, interval=2 * max(1, _num_sparse(layers)), begin=0, end=None, stagger=True)
    makers: dict[str, Callable[[], Twin]] = {
        SPARSE: lambda: _held(make_sparse(rehearsal, dataclasses.replace(plan, method=often)), 0.0)
    }
    if settings.steps is None and plan.density_at(0.0) != plan.density_at(1.0):
        makers[AT_END] = lambda: _held(make_sparse(rehearsal, dataclasses.replace(plan, method=often)), 1.0)
    if settings.twin:
        makers[DENSE] = lambda: make_dense(rehearsal)
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


def batches(settings: TextSettings, corpus: Corpus) -> tuple[Batches, Windows]:
    """What both networks train on, and what both are judged by."""
    shape = {"context": settings.context, "batch": settings.batch}
    return (
        Batches(text=corpus.train, seed=settings.seed, **shape),
        Windows(text=corpus.valid, wanted_bytes=settings.eval_bytes, **shape),
    )
