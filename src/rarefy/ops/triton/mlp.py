"""MLPs of square blocks: activations, their gradients and the gate's products happen where a product leaves registers.

What the hidden features cost in memory traffic is z, kept, and act(z), once forward and once backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy.ops.triton.epilogue import Epilogue
from rarefy.ops.triton.operands import bias_gradient, forward, input_gradient, product_dtype, values_gradient

if TYPE_CHECKING:
    from rarefy.ops.mlp import Matrices

GROUP = 64
"""Tokens that z holds side by side: `rarefy.ops.native.SAVED_TOKENS`."""


def mlp(
    m: Matrices, x: Tensor, biases: Sequence[Tensor | None], activation: int, saved: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.mlp`: y and z."""
    hidden, gated = m[-1][1].in_features, len(m) == 3
    kept = x.new_empty(-(-x.shape[0] // GROUP), (1 + gated) * hidden, GROUP, dtype=saved)
    kinds = ("keep", "gate") if gated else ("activate",)
    h = x
    for kind, (values, index), bias in zip(kinds, m, biases, strict=False):
        h = forward(values, index, x, bias, out_dtype=x.dtype, epilogue=Epilogue(kind, activation, kept))
    values, index = m[-1]
    return forward(values, index, h, biases[-1], out_dtype=x.dtype), kept


def mlp_backward(
    m: Matrices, dy: Tensor, x: Tensor, z: Tensor, activation: int, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, then of each matrix' values and bias; None where `needs` does not ask for it."""
    values, index = m[-1]
    gated, size = len(m) == 3, (x.shape[0], index.in_features)
    second = x.new_empty(size)
    third = x.new_empty(size) if gated else None
    kind = "gate_backward" if gated else "activate_backward"
    epilogue = Epilogue(kind, activation, z.contiguous(), second, third)
    first = input_gradient(values, index, dy, out_dtype=x.dtype, epilogue=epilogue)
    inner, h = ([first, second], third) if gated else ([first], second)
    assert h is not None
    dx, gradients = None, []
    for at, ((values, index), given, source) in enumerate(zip(m, [*inner, dy], [x] * len(inner) + [h], strict=True)):
        if needs[0] and at < len(inner):
            part = input_gradient(values, index, given, out_dtype=x.dtype)
            dx = part if dx is None else dx + part
        dtype = product_dtype(values, x)
        wanted = needs[2 * at + 1 : 2 * at + 3]
        gradients.append(
            values_gradient(index, given, source, dtype=dtype, out_dtype=values.dtype) if wanted[0] else None
        )
        gradients.append(bias_gradient(given, values.dtype) if wanted[1] else None)
    return dx, *gradients
