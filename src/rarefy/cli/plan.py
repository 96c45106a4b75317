"""`rarefy plan`: what would become sparse, and what that costs and saves, before anything is trained; with a budget,
what to train.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import rarefy
from rarefy.bench.images import SIDE, network
from rarefy.cost import CostModel, check, cost_model, load_model
from rarefy.cost.descriptions import load_machine, machine_names
from rarefy.models import GPT
from rarefy.plan.elsewhere import Elsewhere
from rarefy.recipes.text import TextSettings
from rarefy.training.machine import machine


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Explain a plan on the GPT of `rarefy train text` or a network for images: density, bytes, FLOPs and time against
    dense, a layer at a time.
    """

    plan: Path | None = None
    """A plan file (YAML). The options below override it. Default: 10% SET, dense head."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Default: the plan's, 0.1."""

    method: str | None = None
    """How the pattern is found: rigl, set or static. Default: the plan's, set."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the density is spread over layers. Default: the plan's, uniform."""

    block: int | tuple[int, int] | Literal["auto"] | None = None
    """Unit shape: 1 is unstructured, 4 is 4x4, "4 1" is four outputs of one input, auto each layer's by time. Default:
    the plan's, 1."""

    keep_dense: tuple[str, ...] | None = None
    """Globs over layer names to leave dense, such as head or "*.attention.*". Default: the plan's, head."""

    budget: str | None = None
    """Choose what to train in so much training time instead (90s, 10m, 1.5h): width, depth, density, block, precision
    and steps, dense and sparse, with the loss to expect of each and the race that checks it."""

    memory: str | None = None
    """With --budget: the most that a training step may take, such as 8G or 500M. Default: no limit."""

    data: str | None = None
    """With --budget: the text, as `rarefy race` reads it. Default: the source of Python's standard library."""

    network: Literal["gpt", "wrn16x2", "wrn22x2", "wrn28x10", "resnet18"] = "gpt"
    """The network: the GPT of the options below, or one of convolutions for images of 32x32 pixels, on --images."""

    images: int = 128
    """Images a step, of a network for images."""

    width: int = TextSettings.width
    """Features of a position."""

    layers: int = TextSettings.layers
    """Transformer blocks."""

    heads: int = TextSettings.heads
    """Attention heads, which share the width."""

    context: int = TextSettings.context
    """Bytes that a prediction can see."""

    batch: int = TextSettings.batch
    """Windows of text a step."""

    threads: int | None = None
    """CPU threads. Default: what torch takes."""

    measure: bool = True
    """Time each layer shape, sparse and dense, and leave dense what sparse would slow down on this machine."""

    predict: bool = False
    """Take the times from the cost model instead, calibrated once in about a minute: nothing else is timed."""

    calibrate: bool = False
    """Calibrate the cost model of this machine anew, and stop."""

    check: bool = False
    """Time layers that the calibration never saw beside what the cost model predicts of them, and stop."""

    machine: str | None = None
    """Hardware that is not at hand, by name or as a YAML file: when would sparse win there?"""

    machines: bool = False
    """List the machines that have a description, and stop."""

    json: bool = False
    """Print JSON, and nothing else, to stdout."""


CHOSEN = (
    *("plan", "network", "images", "density", "distribution", "block"),
    *("keep_dense", "width", "layers", "batch", "machine"),
)
"""Options that say what --budget is to find out, or that mean another question."""


def run(settings: Plan) -> None:
    """Print the table, or JSON."""
    if settings.machines:
        _list_machines(settings)
        return
    if settings.budget is None and (settings.memory is not None or settings.data is not None):
        raise ValueError("--memory and --data are for --budget: say how long training may take, such as --budget 30m")
    text, plan = _settled(settings)
    before = torch.get_num_threads()
    torch.set_num_threads(before if settings.threads is None else settings.threads)
    try:
        if settings.calibrate or settings.check:
            _model_alone(settings)
        elif settings.budget is not None:
            _choose(settings, settings.budget)
        elif settings.machine is not None:
            _elsewhere(settings, text, plan)
        else:
            _explain(settings, text, plan)
    finally:
        torch.set_num_threads(before)


def _explain(settings: Plan, text: TextSettings, plan: rarefy.Plan) -> None:
    model, sample = _network(settings, text)
    predicted = settings.predict or (plan.block == "auto" and not settings.measure)
    costs = _model() if predicted or plan.block == "auto" else None
    if predicted:
        explanation = plan.explain(model, sample, measure=False, costs=costs)
    else:
        explanation = plan.explain(model, sample if settings.measure else None, costs=costs)
    size = {"tokens": settings.batch * settings.context} if settings.network == "gpt" else {"images": settings.images}
    about = {**machine(), **size}
    if settings.json:
        fitted = {} if costs is None else {"cost_model": dict(costs.fitted)}
        _print_json({"machine": about, **fitted, "plan": plan.to_dict(), **explanation.to_json()})
        return
    _print_network(settings)
    if predicted or settings.measure:
        how = "predicted for" if predicted else "timed on"
        print(f"{how} {about['cpu']}, {about['threads']} threads, kernels {about['isa']}, torch {about['torch']}")
    if costs is not None:
        print(f"cost model of {costs.fitted.get('date', '?')}; rarefy plan --check shows how well it fits")
    print(f"\n{explanation}")


def _choose(settings: Plan, budget: str) -> None:
    from rarefy.cli import plan_budget

    said = [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != f.default]
    if chosen := [f"--{name.replace('_', '-')}" for name in said if name in CHOSEN]:
        raise ValueError(f"--budget chooses {', '.join(chosen)} itself: leave that out, or --budget")
    wish = plan_budget.wish_of(budget, settings.memory, context=settings.context, heads=settings.heads)
    corpus = plan_budget.read(settings.data, settings.context)
    plan_budget.run(
        wish, corpus, _model(), budget=budget, data=settings.data, method=settings.method, as_json=settings.json
    )


def _elsewhere(settings: Plan, text: TextSettings, plan: rarefy.Plan) -> None:
    assert settings.machine is not None
    there = load_machine(settings.machine)
    if plan.block == "auto":  # every structure that is known there is listed, whatever would be chosen here
        plan = dataclasses.replace(plan, block=1)
    model, sample = _network(settings, text)
    found = Elsewhere.of(there, plan, model, sample)
    if settings.json:
        _print_json({"plan": plan.to_dict(), **found.to_json()})
        return
    _print_network(settings)
    print(f"\n{found}")


def _model_alone(settings: Plan) -> None:
    model = _model(anew=settings.calibrate)
    if settings.calibrate:
        data = {"conditions": dict(model.conditions), "fitted": dict(model.fitted)}
        if settings.json:
            _print_json(data)
            return
        about = model.fitted
        print(
            f"calibrated in {about['seconds']} s on {about['points']} timings; it fits them with a median error of "
            f"{about['median_error']:.0%}, nine in ten within {about['p90_error']:.0%}"
        )
        return
    found = check(model, progress=_progress)
    if settings.json:
        _print_json(
            {
                "machine": machine(),
                "cost_model": dict(model.fitted),
                "rows": found.rows,
                **found.summary,
                "again": found.again,
            }
        )
        return
    about = machine()
    print(f"{about['cpu']}, {about['threads']} threads, kernels {about['isa']}, torch {about['torch']}")
    print(f"cost model of {model.fitted.get('date', '?')}\n\n{found}")


def _list_machines(settings: Plan) -> None:
    found = {name: load_machine(name) for name in machine_names()}
    if settings.json:
        _print_json(
            {name: {"title": m.title, "imagined": m.imagined, "estimates": m.estimates} for name, m in found.items()}
        )
        return
    width = max(map(len, found))
    for name, described in found.items():
        print(f"{name.ljust(width)}  {described.title}" + (" (imagined)" if described.imagined else ""))


def _model(*, anew: bool = False) -> CostModel:
    """The cost model of this machine; says on stderr what takes so long, if it does."""
    found = None if anew else load_model()
    return cost_model(anew=anew, progress=_progress) if found is None else found


def _progress(text: str) -> None:
    print(f"rarefy: {text}", file=sys.stderr)


def _network(settings: Plan, text: TextSettings) -> tuple[nn.Module, torch.Tensor]:
    """The network and an input of a step's shape, without memory: a plan needs shapes alone."""
    if settings.network != "gpt":
        if settings.images < 1:
            raise ValueError(f"--images must be at least 1, got {settings.images}")
        return network(settings.network).to("meta"), torch.zeros(settings.images, 3, SIDE, SIDE, device="meta")
    with torch.device("meta"):
        return GPT(text.gpt()), torch.zeros(settings.batch, settings.context, dtype=torch.int64)


def _print_network(settings: Plan) -> None:
    if settings.network != "gpt":
        print(f"{settings.network}, {settings.images} images of {SIDE}x{SIDE} pixels a step, fp32")
        return
    print(
        f"GPT of width {settings.width}, {settings.layers} layers, {settings.heads} heads; "
        f"{settings.batch * settings.context} tokens a step ({settings.batch} x {settings.context}), fp32"
    )


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _settled(settings: Plan) -> tuple[TextSettings, rarefy.Plan]:
    """The training settings that have this network, and the plan file with the options on top."""
    given = {} if settings.plan is None else {"plan": rarefy.Plan.from_yaml(settings.plan)}
    shared = ("density", "method", "distribution", "block", "width", "layers", "heads", "context", "batch", "threads")
    text = TextSettings(**given, **{name: getattr(settings, name) for name in shared})
    plan = text.folded_plan()
    if settings.keep_dense is not None:
        plan = dataclasses.replace(plan, keep_dense=settings.keep_dense)
    return text, plan
