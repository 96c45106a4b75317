"""The best dense and the best sparse network of a grid for a given time and memory, by what is foreseen of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rarefy.cost import CALIBRATED_BLOCKS, PRECISIONS, Precision
from rarefy.foresight.law import Law, Point
from rarefy.foresight.memory import StepBytes, step_bytes
from rarefy.foresight.shape import Shape
from rarefy.recipes.text.field import NARROW, SPARSE_ATTENTION

WIDTHS = (
    64, 96, 112, 128, 144, 160, 192, 208, 224, 256, 288, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536,
)  # fmt: skip
LAYERS = (1, 2, 3, 4, 6, 8, 12)
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
BATCHES = (2, 4, 8, 16, 32, 64)
HEAD = 16
"""Features that a head of narrow attention has at least."""

StepTime = Callable[[Shape], float | None]
"""Milliseconds of a network's step; None if they cannot be foreseen."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is given."""

    minutes: float
    """Of training."""
    memory_bytes: int | None = None
    """The most that a step may take at its peak; None: no limit."""
    context: int = 256
    heads: int = 4
    precisions: tuple[Precision, ...] = PRECISIONS
    """Those that may be chosen; what has no step time is left out anyway."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"the budget must be positive, got {self.minutes:g} minutes")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory must be positive, got {self.memory_bytes} bytes")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network with what is foreseen of it."""

    shape: Shape
    step_ms: float
    steps: int
    """That fit into the time."""
    memory: StepBytes
    loss: float
    """At the end, nats a byte."""
    sigma: float
    """Standard deviation of the loss that a run will have around that."""
    outside: tuple[str, ...]
    """Of nonzeros, tokens and so on, those beyond what the law was fitted on."""

    @property
    def tokens(self) -> int:
        """Bytes trained on, D of the law."""
        return self.steps * self.shape.tokens

    @property
    def point(self) -> Point:
        """What the law was asked."""
        return point_of(self.shape, self.tokens)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best of both sides."""

    wish: Wish
    dense: Candidate | None
    sparse: Candidate | None
    considered: int
    """Networks that can be trained here, as far as is known."""
    too_large: int
    """Of these, those beyond the memory."""
    difference: float | None
    """Loss of the sparse one minus the dense one's, nats a byte; None if a side is missing."""
    difference_sigma: float | None

    @property
    def winner(self) -> str:
        """sparse, dense, neither (too close to call: within a standard deviation), or open where a side is missing."""
        if self.difference is None or self.difference_sigma is None:
            return "open"
        if abs(self.difference) <= self.difference_sigma:
            return "neither"
        return "sparse" if self.difference < 0 else "dense"


def choose(wish: Wish, law: Law, step_ms: StepTime) -> Choice:
    """Of the grid's networks that fit, those of the lowest loss foreseen, dense and sparse; of equals the faster."""
    best: dict[bool, Candidate] = {}
    considered = too_large = 0
    for shape in grid(wish, law):
        ms = step_ms(shape)
        steps = 0 if ms is None else int(wish.minutes * 60e3 / ms)
        if ms is None or steps < 1:
            continue
        considered += 1
        memory = step_bytes(shape)
        if wish.memory_bytes is not None and memory.peak > wish.memory_bytes:
            too_large += 1
            continue
        found = _candidate(law, shape, ms, steps, memory)
        if shape.dense not in best or (found.loss, ms) < (best[shape.dense].loss, best[shape.dense].step_ms):
            best[shape.dense] = found
    dense, sparse = best.get(True), best.get(False)
    difference = sigma = None
    if dense is not None and sparse is not None:
        difference, sigma = sparse.loss - dense.loss, law.sigma_between(sparse.point, dense.point)
    return Choice(
        wish=wish,
        dense=dense,
        sparse=sparse,
        considered=considered,
        too_large=too_large,
        difference=difference,
        difference_sigma=sigma,
    )


def grid(wish: Wish, law: Law) -> Iterator[Shape]:
    """Every network that may be chosen.

    Of depths, shares of attention, densities, blocks and tokens a step only what the law has seen, as it would answer
    for others as if they made no difference; widths are free, since the law is made to be asked about more weights.
    """
    depths = [layers for layers in LAYERS if not law.outside(layers=layers)]
    batches = [batch for batch in BATCHES if not law.outside(tokens_per_step=batch * wish.context)]
    structures: list[tuple[float, tuple[int, int]]] = [(1.0, (1, 1))]
    blocks = [block for block in CALIBRATED_BLOCKS if law.knows(block)]
    densities = [density for density in DENSITIES if density < 1 and not law.outside(density=density)]
    structures += itertools.product(densities, blocks)
    widths = [(width, attended) for width in WIDTHS for attended in attention_widths(width, wish.heads, law)]
    sizes = itertools.product(widths, depths, batches, structures, wish.precisions)
    for (width, attended), layers, batch, (density, block), precision in sizes:
        shape = Shape(
            width=width, layers=layers, attention=None if attended == width else attended, heads=wish.heads,
            context=wish.context, batch=batch, density=density, block=block, precision=precision,
        )  # fmt: skip
        if shape.fits:
            yield shape


def attention_widths(width: int, heads: int, law: Law) -> list[int]:
    """Features that attention may have in a network of this width, widest first: all, or a race's shares."""
    even = 2 * heads  # rotary positions turn pairs of features of a head
    narrow = [max(HEAD * heads, even * math.ceil(share * width / even)) for share in (NARROW, SPARSE_ATTENTION)]
    found = [width, *(features for features in narrow if features < width)]
    return [features for features in dict.fromkeys(found) if not law.outside(attention=features / width)]


def point_of(shape: Shape, tokens: int) -> Point:
    """The law's question about a network and the bytes that it is trained on."""
    return Point(shape.nonzeros, tokens, shape.density, shape.block, shape.layers)


def _candidate(law: Law, shape: Shape, ms: float, steps: int, memory: StepBytes) -> Candidate:
    tokens = steps * shape.tokens
    point = point_of(shape, tokens)
    beyond = law.outside(
        nonzeros=shape.nonzeros, tokens=tokens, density=shape.density, layers=shape.layers,
        attention=shape.attended / shape.width, tokens_per_step=shape.tokens,
    )  # fmt: skip
    return Candidate(
        shape=shape, step_ms=ms, steps=steps, memory=memory, loss=law.loss(point), sigma=law.sigma(point),
        outside=tuple(beyond),
    )  # fmt: skip
