"""The settings of a text run: what the user may say, and how what was left open is filled in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from rarefy.methods import SET
from rarefy.models import GPTConfig
from rarefy.plan import Plan
from rarefy.recipes.settings import RunSettings
from rarefy.training.loop import LoopSettings

DEFAULT_PLAN = Plan(density=0.1, method=SET(), keep_dense=("head",))
"""In runs of minutes RigL ends behind a pattern that stays, by 0.03 bits per byte with every seed, and SET does not
(docs/results.md, "Stagger against all at once").
"""


@dataclass(frozen=True, kw_only=True)
class TextSettings(RunSettings):
    """Train a small GPT on bytes, sparse from its first step, beside its dense twin."""

    default_plan: ClassVar[Plan] = DEFAULT_PLAN
    min_eval_interval: ClassVar[int] = 10

    data: str | None = None
    """Text: a file (plain, .gz, .xz), a folder, or hf:NAME. Without it: the source of Python's standard library."""

    plan: Plan = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's, 0.1."""

    method: str | None = None
    """How the pattern is found: rigl, set or static, or another method's class name. Without it: the plan's, set."""

    width: int = 256
    """Features of a position."""

    layers: int = 4
    """Transformer blocks."""

    heads: int = 4
    """Attention heads, which share its features."""

    attention: int | None = None
    """Features of all attention heads together. Without it: the width."""

    mlp: int | None = None
    """Hidden features of the MLP. Without it: four times the width."""

    positions: Literal["rotary", "learned"] = "rotary"
    """How attention knows where a byte stands: queries and keys turn with their positions, or each position has a
    learned vector, as in GPT-2."""

    activation: Literal["squared_relu", "gelu"] = "squared_relu"
    """Of the MLP's hidden features."""

    token_shift: bool = True
    """Let attention and MLP read half of their features from the byte before."""

    context: int = 256
    """Bytes that a prediction can see."""

    batch: int = 8
    """Windows of text a micro-batch."""

    accumulate: int = 1
    """Micro-batches an optimizer step."""

    lr: float = 4e-3
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

    weight_decay: float = 0.1
    """Of weights; biases, norms and embeddings have none."""

    eval_interval: int | None = None
    """Steps between two evaluations. Without it, by --evaluations, at least 10."""

    recompute: bool = False
    """Keep only what enters each block, and run the blocks again in the backward pass: less memory for activations, and
    a forward pass more of time."""

    eval_bytes: int = 16384
    """Bytes of validation text predicted at each evaluation."""

    sample_bytes: int = 300
    """Bytes of text to write at the end."""

    def __post_init__(self) -> None:
        self._at_least_one("batch", "accumulate", "eval_bytes")
        self._not_negative("sample_bytes")
        if self.parametrization == "mup" and self.sparse_lr is not None:
            raise ValueError(
                f"sparse_lr ({self.sparse_lr:g}) and parametrization mup both say the sparse layers' rate: with mup it "
                "follows from lr; leave sparse_lr out"
            )
        super().__post_init__()
        self.gpt()

    def gpt(self) -> GPTConfig:
        """The network's shape."""
        base = {"base_width": self.base_width, "base_head": self.base_head} if self.parametrization == "mup" else {}
        return GPTConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            attention=self.attention,
            context=self.context,
            mlp=self.mlp,
            positions=self.positions,
            activation=self.activation,
            token_shift=self.token_shift,
            **base,
        )

    @property
    def tokens_per_step(self) -> int:
        """Bytes predicted in an optimizer step."""
        return self.batch * self.context * self.accumulate

    def auto_sparse_lr(self, density: float) -> float | None:
        """See `RunSettings`."""
        return None if self.parametrization == "mup" else super().auto_sparse_lr(density)

    def auto_dense_lr(self) -> float:
        """See `RunSettings`."""
        return self.lr if self.parametrization == "mup" else self.lr / 2

    def loop(self) -> LoopSettings:
        """See `RunSettings`."""
        return dataclasses.replace(super().loop(), accumulate=self.accumulate)
