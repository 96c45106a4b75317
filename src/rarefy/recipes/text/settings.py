"""The settings of a text run: what the user may say, and how what was left open is filled in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rarefy.models import GPTConfig
from rarefy.plan import Plan
from rarefy.recipes.plans import folded, short_interval

DEFAULT_PLAN = Plan(density=0.1, keep_dense=("head",))
DEFAULT_MINUTES = 3.0
EVALUATIONS = 10
"""Of a run, unless it says how many steps lie between them."""
MIN_EVAL_INTERVAL = 10
"""Fewer steps between two evaluations would mostly evaluate."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Train a small GPT on bytes, sparse from its first step, beside its dense twin."""

    data: str | None = None
    """Text: a file (plain, .gz, .xz), a folder, or hf:NAME. Without it: the source of Python's standard library."""

    steps: int | None = None
    """Optimizer steps of each network. Without it: as many as fit into --minutes."""

    minutes: float | None = None
    """Length of the whole run, all included; becomes a number of steps before training begins. Without it: 3."""

    plan: Plan = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's, 0.1."""

    method: str | None = None
    """How the pattern is found: rigl, set or static, or another method's class name. Without it: the plan's, rigl."""

    interval: int | None = None
    """Steps between two rewires of a layer. Without it: the plan file's, else a twentieth of the run, 10 to 100."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the density is spread over layers. Without it: the plan's, uniform."""

    block: int | tuple[int, int] | Literal["auto"] | None = None
    """Unit shape: 1 is unstructured, 4 is 4x4, "4 1" is four outputs of one input, auto each layer's by time. Without
    it: the plan's, 1."""

    measure: bool = True
    """Time each layer shape first, and leave dense what sparse would slow down on this machine."""

    twin: bool = True
    """Train the dense twin too."""

    width: int = 256
    """Features of a position."""

    layers: int = 4
    """Transformer blocks."""

    heads: int = 4
    """Attention heads, which share the width."""

    mlp: int | None = None
    """Hidden features of the MLP. Without it: four times the width."""

    context: int = 256
    """Bytes that a prediction can see."""

    batch: int = 8
    """Windows of text a micro-batch."""

    accumulate: int = 1
    """Micro-batches an optimizer step."""

    lr: float = 2e-3
    """Peak learning rate of the sparse network, but for its sparse layers."""

    sparse_lr: float | None = None
    """Peak learning rate of the sparse layers' values. Without it: lr / density ** 0.3, so twice lr at 10%, the first
    density where it moves; with mup it follows from lr."""

    dense_lr: float | None = None
    """Peak learning rate of the dense twin. Without it: lr / 2, its best in short runs (docs/log.md); lr with mup."""

    parametrization: Literal["standard", "mup"] = "standard"
    """mup: first weights and rates follow width and density, from --lr as the rate of a dense network of --base-width
    (rarefy.SuPar)."""

    base_width: int = 64
    """Width of the network that --lr is for, with mup."""

    base_head: int | None = None
    """Features of a head of that network, with mup. Without it: as here."""

    warmup: int | None = None
    """Steps over which the rate rises. Without it: a tenth of the run, at most 100."""

    weight_decay: float = 0.1
    """Of weights; biases, norms and embeddings have none."""

    beta2: float = 0.99
    """Decay of Adam's second moment."""

    clip: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""

    optimizer: Literal["rarefy", "torch"] = "rarefy"
    """AdamW of the sparse network: rarefy's, which knows newborn weights, or torch's. The dense twin has torch's."""

    eval_interval: int | None = None
    """Steps between two evaluations. Without it: a tenth of the run, at least 10."""

    eval_bytes: int = 16384
    """Bytes of validation text predicted at each evaluation."""

    slice_steps: int = 5
    """Steps that one network takes before it is the other's turn."""

    checkpoint_s: float = 60.0
    """Seconds between two checkpoints."""

    sample_bytes: int = 300
    """Bytes of text to write at the end."""

    seed: int = 0
    """Of weights, patterns and data order."""

    device: str = "cpu"
    """Where to train."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """In what both networks compute: bf16 under autocast, with fp32 weights and gradients of weights."""

    threads: int | None = None
    """CPU threads. Without it: what torch takes."""

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "interval",
            "warmup",
            "eval_interval",
            "threads",
            "batch",
            "accumulate",
            "eval_bytes",
            "slice_steps",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("minutes", "lr", "sparse_lr", "dense_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("weight_decay", "clip", "checkpoint_s", "sample_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"steps ({self.steps}) and minutes ({self.minutes:g}) both say how long the run is: give one of them"
            )
        if self.parametrization == "mup" and self.sparse_lr is not None:
            raise ValueError(
                f"sparse_lr ({self.sparse_lr:g}) and parametrization mup both say the sparse layers' rate: with mup it "
                "follows from lr; leave sparse_lr out"
            )
        if not isinstance(self.block, int | str | None):
            object.__setattr__(self, "block", tuple(self.block))
        self.gpt()
        self.folded_plan()

    def gpt(self) -> GPTConfig:
        """The network's shape."""
        base = {"base_width": self.base_width, "base_head": self.base_head} if self.parametrization == "mup" else {}
        return GPTConfig(
            width=self.width, layers=self.layers, heads=self.heads, context=self.context, mlp=self.mlp, **base
        )

    @property
    def tokens_per_step(self) -> int:
        """Bytes predicted in an optimizer step."""
        return self.batch * self.context * self.accumulate

    def folded_plan(self) -> Plan:
        """The plan with what the options say on top of it."""
        return folded(
            self.plan,
            method=self.method,
            interval=self.interval,
            seed=self.seed,
            density=self.density,
            distribution=self.distribution,
            block=self.block,
        )

    def folded(self) -> TextSettings:
        """The same settings, said with the plan alone, and with the data's whole path."""
        data = self.data
        if data is not None and not data.startswith("hf:"):
            data = str(Path(data).absolute())
        unset = dict.fromkeys(("density", "method", "interval", "distribution", "block"))
        return dataclasses.replace(self, plan=self.folded_plan(), data=data, **unset)

    def auto_interval(self, steps: int) -> int:
        """Steps between two rewires of a layer in a run of `steps`."""
        if self.interval is not None or self.plan != DEFAULT_PLAN:
            return self.folded_plan().method.interval
        return short_interval(steps)

    def settled(self, steps: int) -> TextSettings:
        """Nothing left open: folded, for a run of `steps`."""
        density, mup = self.folded_plan().density_at(0.0), self.parametrization == "mup"
        sparse_lr = self.sparse_lr if self.sparse_lr is not None or mup else self.lr / density**0.3
        return dataclasses.replace(
            dataclasses.replace(self, interval=self.auto_interval(steps)).folded(),
            steps=steps,
            minutes=None,
            sparse_lr=sparse_lr,
            dense_lr=self.dense_lr if self.dense_lr is not None else self.lr if mup else self.lr / 2,
            warmup=self.warmup if self.warmup is not None else max(1, min(100, steps // 10)),
            eval_interval=self.eval_interval
            if self.eval_interval is not None
            else max(MIN_EVAL_INTERVAL, round(steps / EVALUATIONS)),
            threads=self.threads if self.threads is not None else torch.get_num_threads(),
        )


def check_same(saved: TextSettings, asked: TextSettings, where: str) -> None:
    """Whether a run may go on with these settings.

    Raises:
        ValueError: one differs from what the run has, by name. Everything that a resumed run does follows from them.
    """
    if asked.minutes is not None or asked.steps != saved.steps:
        raise ValueError(fixed_steps(where, saved.steps))
    for name, here, there in _differences(asked.folded(), saved.folded(), ""):
        raise ValueError(
            f"{where} was started with {name} {there!r}, and {here!r} was asked for: --resume goes on "
            "with a run as it is; leave that out, or start a new run"
        )


def fixed_steps(where: str, steps: int | None) -> str:
    """Why a run that goes on cannot become longer or shorter."""
    return (
        f"{where} has {steps} steps, and its schedules depend on that: leave --steps and --minutes out with --resume, "
        "or start a new run"
    )


def _differences(here: Any, there: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    """(name, here, there) of each field that differs, down to nested settings."""
    found = []
    for field in dataclasses.fields(here):
        ours, theirs = getattr(here, field.name), getattr(there, field.name)
        if ours == theirs:
            continue
        if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
            found += _differences(ours, theirs, f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, ours, theirs))
    return found
