"""What every recipe lets its user say of the pattern and the training, and how what was left open is filled in."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from rarefy.plan import Plan
from rarefy.recipes.plans import folded, short_interval
from rarefy.training.loop import LoopSettings

SAID_BY_PLAN = ("density", "method", "interval", "distribution", "block")
"""Options that say what a plan can say too."""

DEFAULT_MINUTES = 3.0


@dataclass(frozen=True, kw_only=True)
class RunSettings(ABC):
    """The base of a recipe's settings, which adds the data and the network."""

    default_plan: ClassVar[Plan]
    min_eval_interval: ClassVar[int] = 1
    """Fewer steps between two evaluations would mostly evaluate."""

    data: str | None = None
    """What to train on."""

    steps: int | None = None
    """Optimizer steps of each network. Without it: as many as fit into --minutes."""

    plan: Plan
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's."""

    method: str | None = None
    """How the pattern is found: rigl, set or static, or another method's class name. Without it: the plan's."""

    interval: int | None = None
    """Steps between two rewires of a layer. Without it: the plan file's, else a twentieth of the run, 10 to 100."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the density is spread over layers. Without it: the plan's, uniform."""

    block: int | tuple[int, int] | Literal["auto"] | None = None
    """Unit shape: 1 is unstructured, 4 is 4x4, "4 1" is four outputs of one input, auto each layer's by time. Without
    it: the plan's, 1."""

    lr: float
    """Peak learning rate of the sparse network, but for its sparse layers."""

    sparse_lr: float | None = None
    """Peak learning rate of the sparse layers' values. Without it: lr / density ** 0.3, so twice lr at 10%, the first
    density where it moves."""

    dense_lr: float | None = None
    """Peak learning rate of a dense network. Without it: lr."""

    warmup: int | None = None
    """Steps over which the rate rises. Without it: a tenth of the run, at most 100."""

    weight_decay: float
    """Of weights; biases, norms and embeddings have none."""

    beta2: float = 0.99
    """Decay of Adam's second moment."""

    momentum: float = 0.9
    """Of sgd."""

    clip: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""

    optimizer: Literal["rarefy", "torch", "sgd"] = "rarefy"
    """AdamW of the sparse network: rarefy's, which knows newborn weights, or torch's, which a dense network always has;
    or SGD with momentum, of both."""

    ramp: int = 0
    """Steps over which the updates of a newborn weight grow to their full size, with rarefy's AdamW."""

    precision: Literal["fp32", "bf16"] | None = None
    """Of activations and of the arithmetic on them: bf16 runs the forward pass under autocast. Weights, their gradients
    and the optimizer stay fp32. Without it: fp32."""

    compile: bool | None = None
    """Have torch.compile make the network's code, which takes a minute first. Without it: no."""

    eval_interval: int | None = None
    """Steps between two evaluations. Without it, by --evaluations."""

    evaluations: int = 10
    """Evaluations of a run, unless --eval-interval says how many steps lie between two."""

    checkpoint_s: float = 60.0
    """Seconds between two checkpoints."""

    seed: int = 0
    """Of weights, patterns and data order."""

    device: str = "cpu"
    """Where to train."""

    threads: int | None = None
    """CPU threads. Without it: what torch takes."""

    minutes: float | None = None
    """Length of the whole run, all included; becomes a number of steps before training begins. Without it: 3."""

    measure: bool = True
    """Time each layer shape first, and leave dense what sparse would slow down on this machine."""

    twin: bool = True
    """Train the dense twin too."""

    slice_steps: int = 5
    """Steps that one network takes before it is the other's turn."""

    def __post_init__(self) -> None:
        self._at_least_one("steps", "interval", "warmup", "eval_interval", "evaluations", "threads", "slice_steps")
        self._positive("lr", "sparse_lr", "dense_lr", "minutes")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"steps ({self.steps}) and minutes ({self.minutes:g}) both say how long the run is: give one of them"
            )
        self._not_negative("weight_decay", "clip", "checkpoint_s", "momentum", "ramp")
        if not self.momentum < 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum:g}")
        if not isinstance(self.block, int | str | None):
            object.__setattr__(self, "block", tuple(self.block))
        self.folded_plan()

    def _at_least_one(self, *names: str) -> None:
        self._check(names, lambda value: value >= 1, "be at least 1")

    def _positive(self, *names: str) -> None:
        self._check(names, lambda value: value > 0, "be positive")

    def _not_negative(self, *names: str) -> None:
        self._check(names, lambda value: value >= 0, "not be negative")

    def _check(self, names: Iterable[str], holds: Callable[[float], bool], must: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must {must}, got {value}")

    # -- the plan -----------------------------------------------------------------------------------------------------

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

    def with_plan(self, plan: Plan) -> Self:
        """The same, with a plan that says all about the pattern."""
        return dataclasses.replace(self, plan=plan, **dict.fromkeys(SAID_BY_PLAN))

    def auto_interval(self, steps: int) -> int:
        """Steps between two rewires of a layer in a run of `steps`."""
        if self.interval is not None or self.plan != self.default_plan:
            return self.folded_plan().method.interval
        return short_interval(steps)

    # -- filled in ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tokens_per_step(self) -> int:
        """Bytes or images that an optimizer step learns from."""

    def auto_sparse_lr(self, density: float) -> float | None:
        """The rate of sparse layers that were given none, from the first density where it moves."""
        return self.lr / density**0.3

    def auto_dense_lr(self) -> float:
        """The rate of a dense network that was given none."""
        return self.lr

    def folded(self) -> Self:
        """The same settings, said with the plan alone, and with the data's whole path."""
        data = self.data
        if data is not None and not data.startswith("hf:"):
            data = str(Path(data).absolute())
        return dataclasses.replace(self.with_plan(self.folded_plan()), data=data)

    def settled(self, steps: int) -> Self:
        """Nothing left open: folded, for a run of `steps`."""
        plan = dataclasses.replace(self, interval=self.auto_interval(steps)).folded_plan()
        every = max(self.min_eval_interval, round(steps / self.evaluations))
        filled = dataclasses.replace(
            self.with_plan(plan),
            steps=steps,
            minutes=None,
            sparse_lr=self.auto_sparse_lr(plan.density_at(0.0)) if self.sparse_lr is None else self.sparse_lr,
            dense_lr=self.auto_dense_lr() if self.dense_lr is None else self.dense_lr,
            warmup=max(1, min(100, steps // 10)) if self.warmup is None else self.warmup,
            eval_interval=every if self.eval_interval is None else self.eval_interval,
            threads=torch.get_num_threads() if self.threads is None else self.threads,
        )
        return filled.folded()

    def loop(self) -> LoopSettings:
        """The loop's part of settled settings."""
        assert self.steps is not None and self.warmup is not None and self.eval_interval is not None, "settled"
        return LoopSettings(
            steps=self.steps,
            warmup=self.warmup,
            eval_interval=self.eval_interval,
            tokens_per_step=self.tokens_per_step,
            clip=self.clip,
            slice_steps=self.slice_steps,
            checkpoint_s=self.checkpoint_s,
        )


def check_same(saved: RunSettings, asked: RunSettings, where: str) -> None:
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
