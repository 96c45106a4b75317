"""The settings of an image run: what the user may say, and how what was left open is filled in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from rarefy.models import MLPConfig
from rarefy.plan import Plan
from rarefy.recipes.images.data import CLASSES
from rarefy.recipes.plans import folded, short_interval

DEFAULT_PLAN = Plan(density=0.02, keep_dense=("head",))
EVALUATIONS = 10
"""Of a run, unless it says how many steps lie between them."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Train an MLP to tell images apart, sparse from its first step."""

    data: str | None = None
    """A folder in the layout of MNIST or Fashion-MNIST: four IDX files, plain, .gz or .xz."""

    steps: int | None = None
    """Optimizer steps of each network."""

    plan: Plan = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's, 0.02."""

    method: str | None = None
    """How the pattern is found: a method's class name. Without it: the plan's, rigl."""

    interval: int | None = None
    """Steps between two rewires of a layer. Without it: the plan file's, else a twentieth of the run, 10 to 100."""

    distribution: Literal["uniform", "er", "erk"] | None = None
    """How the density is spread over layers. Without it: the plan's, uniform."""

    block: int | tuple[int, int] | None = None
    """Unit shape: 1 is unstructured, 4 is 4x4, "4 1" is four outputs of one input. Without it: the plan's, 1."""

    hidden: tuple[int, ...] = (1000, 1000, 1000)
    """Features of each hidden layer."""

    batch: int = 128
    """Images a step."""

    shift: int = 0
    """Pixels that a training image is moved at most, at random; 0: none."""

    flip: bool = False
    """Mirror half of the training images."""

    lr: float = 1e-3
    """Peak learning rate of the sparse network, but for its sparse layers."""

    sparse_lr: float | None = None
    """Peak learning rate of the sparse layers' values. Without it: lr / density ** 0.3, so about 3 times lr at 2%."""

    dense_lr: float | None = None
    """Peak learning rate of a dense network. Without it: lr."""

    warmup: int | None = None
    """Steps over which the rate rises. Without it: a tenth of the run, at most 100."""

    weight_decay: float = 0.01
    """Of weights; biases have none."""

    beta2: float = 0.99
    """Decay of Adam's second moment."""

    momentum: float = 0.9
    """Of sgd."""

    clip: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""

    optimizer: Literal["rarefy", "torch", "sgd"] = "rarefy"
    """AdamW of the sparse network: rarefy's, which knows newborn weights, or torch's; or SGD with momentum."""

    eval_interval: int | None = None
    """Steps between two evaluations. Without it: a tenth of the run."""

    checkpoint_s: float = 60.0
    """Seconds between two checkpoints."""

    seed: int = 0
    """Of weights, patterns and data order."""

    device: str = "cpu"
    """Where to train."""

    threads: int | None = None
    """CPU threads. Without it: what torch takes."""

    def __post_init__(self) -> None:
        for name in ("steps", "interval", "warmup", "eval_interval", "threads", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "sparse_lr", "dense_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("weight_decay", "clip", "checkpoint_s", "shift", "momentum"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.momentum < 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum:g}")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if not isinstance(self.block, int | None):
            object.__setattr__(self, "block", tuple(self.block))
        self.mlp(1)
        self.folded_plan()

    def mlp(self, inputs: int) -> MLPConfig:
        """The network's shape for images of so many pixels."""
        return MLPConfig(inputs=inputs, hidden=self.hidden, classes=CLASSES)

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

    def auto_interval(self, steps: int) -> int:
        """Steps between two rewires of a layer in a run of `steps`."""
        if self.interval is not None or self.plan != DEFAULT_PLAN:
            return self.folded_plan().method.interval
        return short_interval(steps)

    def settled(self, steps: int) -> ImageSettings:
        """Nothing left open: the plan says all about the pattern, for a run of `steps`."""
        plan = dataclasses.replace(self, interval=self.auto_interval(steps)).folded_plan()
        unset = dict.fromkeys(("density", "method", "interval", "distribution", "block"))
        return dataclasses.replace(
            self,
            **unset,
            plan=plan,
            steps=steps,
            sparse_lr=self.sparse_lr if self.sparse_lr is not None else self.lr / plan.density_at(0.0) ** 0.3,
            dense_lr=self.dense_lr if self.dense_lr is not None else self.lr,
            warmup=self.warmup if self.warmup is not None else max(1, min(100, steps // 10)),
            eval_interval=self.eval_interval if self.eval_interval is not None else max(1, round(steps / EVALUATIONS)),
            threads=self.threads if self.threads is not None else torch.get_num_threads(),
        )
