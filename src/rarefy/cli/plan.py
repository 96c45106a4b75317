"""`rarefy plan`: what would become sparse, and what that costs and saves, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import rarefy
from rarefy.models import GPT
from rarefy.recipes.text import TextSettings
from rarefy.training.machine import machine


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Explain a plan on the GPT of `rarefy train text`: per layer density, bytes, FLOPs, and time against dense."""

    plan: Path | None = None
    """A plan file (YAML). The options below override it. Default: 10% RigL, dense head."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Default: the plan's, 0.1."""

    method: str | None = None
    """How the pattern is found: rigl, set or static. Default: the plan's, rigl."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the density is spread over layers. Default: the plan's, uniform."""

    block: int | tuple[int, int] | None = None
    """Unit shape: 1 is unstructured, 4 is 4x4, "4 1" is four outputs of one input. Default: the plan's, 1."""

    keep_dense: tuple[str, ...] | None = None
    """Globs over layer names to leave dense, such as head or "*.attention.*". Default: the plan's, head."""

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

    json: bool = False
    """Print JSON, and nothing else, to stdout."""


def run(settings: Plan) -> None:
    """Print the table, or JSON."""
    text, plan = _settled(settings)
    before = torch.get_num_threads()
    torch.set_num_threads(before if settings.threads is None else settings.threads)
    try:
        _explain(settings, text, plan)
    finally:
        torch.set_num_threads(before)


def _explain(settings: Plan, text: TextSettings, plan: rarefy.Plan) -> None:
    with torch.device("meta"):  # a plan needs shapes alone: no weights are drawn, however large the network
        model = GPT(text.gpt())
        sample = torch.zeros(settings.batch, settings.context, dtype=torch.int64) if settings.measure else None
    explanation = plan.explain(model, sample)
    about = {**machine(), "tokens": settings.batch * settings.context}
    if settings.json:
        data = {"machine": about, "plan": plan.to_dict(), **explanation.to_json()}
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
        return
    print(
        f"GPT of width {settings.width}, {settings.layers} layers, {settings.heads} heads; "
        f"{about['tokens']} tokens a step ({settings.batch} x {settings.context}), fp32"
    )
    if settings.measure:
        print(f"timed on {about['cpu']}, {about['threads']} threads, kernels {about['isa']}, torch {about['torch']}")
    print(f"\n{explanation}")


def _settled(settings: Plan) -> tuple[TextSettings, rarefy.Plan]:
    """The training settings that have this network, and the plan file with the options on top."""
    given = {} if settings.plan is None else {"plan": rarefy.Plan.from_yaml(settings.plan)}
    shared = ("density", "method", "distribution", "block", "width", "layers", "heads", "context", "batch", "threads")
    text = TextSettings(**given, **{name: getattr(settings, name) for name in shared})
    plan = text.folded_plan()
    if settings.keep_dense is not None:
        plan = dataclasses.replace(plan, keep_dense=settings.keep_dense)
    return text, plan
