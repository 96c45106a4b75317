"""Bytes that a training step needs: what is held between steps by counting, what the forward pass keeps by looking.

The peak of a process is more than its tensors: what the C library and the kernels keep is estimated from a few measured
peaks. Not counted are Python and torch themselves, and what a rewire needs for a moment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.cost import Precision
from rarefy.cost.precision import activation_dtype
from rarefy.foresight.shape import Shape
from rarefy.foresight.timing import Noise, make_network
from rarefy.models.gpt import VOCABULARY

LOOKED_AT = (
    Shape(width=64, layers=1, context=64, batch=1),
    Shape(width=64, layers=2, context=64, batch=1),
    Shape(width=64, layers=1, context=64, batch=2),
    Shape(width=128, layers=2, context=64, batch=2),
    Shape(width=64, layers=2, heads=2, context=64, batch=2),
    Shape(width=192, layers=1, heads=2, context=64, batch=1),
    Shape(width=128, layers=2, attention=64, context=64, batch=2),
    Shape(width=192, layers=1, attention=64, heads=2, context=64, batch=1),
)
"""Small networks whose forward pass is run to see what it keeps: everything is a sum of a few products of their sizes.
Tokens are whole panels of 64, as the kernels of sparse layers keep them.
"""


OVERHEAD, BASE_BYTES = 1.45, 32 << 20
"""Peak of a process over what its activations and their gradients take, and what is there whatever the network.

Fitted to four peaks of tools/step_memory.py (--width 128 --layers 2 --context 256 --batch 8 and 32 --threads 1, fp32,
machine C of docs/log.md, 2026-11-28): dense 100 and 311 MiB, 10% 99 and 273; it gives them back within 10%.
"""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step, each part once."""

    parameters: int
    gradients: int
    optimizer: int
    """Two moments; of a sparse network an age each leading index, of a dense one a step count a tensor."""
    indices: int
    activations: int
    """What the forward pass keeps for the backward pass, weights aside; bf16 copies of dense weights are among it."""

    working: int
    """Gradients of the widest activations, which the backward pass makes while all others are still there."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def peak(self) -> int:
        """What a process that trains it holds at most, estimated, above Python and torch."""
        moving = self.activations + self.working
        return round(self.total + (OVERHEAD - 1) * moving) + BASE_BYTES


def step_bytes(shape: Shape) -> StepBytes:
    """Of a network trained as `rarefy train text` and `rarefy race` do it: fp32 weights and AdamW."""
    parameters = shape.parameters()
    numbers = sum(count for _, count in parameters)
    ages = 4 * (len(parameters) if shape.dense else sum(leading for leading, _ in parameters))
    hidden = 4 * shape.width * activation_dtype(shape.precision).itemsize
    working = shape.tokens * 2 * (hidden + 4 * VOCABULARY)  # two at a time, inside a block and at the loss
    return StepBytes(
        parameters=4 * numbers, gradients=4 * numbers, optimizer=8 * numbers + ages, indices=shape.index_bytes(),
        activations=activation_bytes(shape), working=working,
    )  # fmt: skip


def activation_bytes(shape: Shape) -> int:
    """What a step's forward pass keeps, from what those of a few small networks keep."""
    per_unit = _activation_model(shape.dense, shape.precision)
    return round(float(np.dot(per_unit, _sizes(shape))))


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that autograd keeps in one forward pass, each storage once, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # alive until all is counted
    found = sum(storage.nbytes() for storage in kept.values())
    del out
    return found


@functools.cache
def _activation_model(dense: bool, precision: Precision) -> np.ndarray:
    """Bytes a unit of each of `_sizes`."""
    density = 1.0 if dense else 0.25
    shapes = [replace(shape, density=density, precision=precision) for shape in LOOKED_AT]
    sizes = np.array([_sizes(shape) for shape in shapes], dtype=float)
    return np.linalg.lstsq(sizes, np.array([_look(shape) for shape in shapes], dtype=float), rcond=None)[0]


def _look(shape: Shape) -> int:
    """Bytes that its forward pass keeps."""
    twin = make_network(shape)
    inputs, targets = Noise(shape).at(1)
    return kept_bytes(twin.model, lambda: twin.loss(twin.model, inputs, targets))


def _sizes(shape: Shape) -> list[float]:
    """What activations are proportional to: features, attention's features and heads of every block, features and
    logits outside, weights that autocast copies.
    """
    T = shape.tokens
    inside = sum(out * inputs for out, inputs in shape.linears) * shape.layers
    copied = inside if shape.dense else 0
    wide, attended, heads = shape.width * shape.layers, shape.attended * shape.layers, shape.heads * shape.layers
    return [T * wide, T * attended, T * heads, T * shape.width, T, copied]
