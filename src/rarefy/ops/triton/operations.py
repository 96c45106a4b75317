"""The operations as `rarefy.ops` calls a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.triton import grow
from rarefy.ops.triton.mlp import mlp, mlp_backward
from rarefy.ops.triton.operands import (
    bias_gradient,
    by_token,
    forward,
    input_gradient,
    product_dtype,
    values_gradient,
)

__all__ = ["grow_candidates", "mlp", "mlp_backward", "sddmm", "spmm", "spmm_backward", "spmm_t"]


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    return forward(values, index, x, bias, out_dtype=x.dtype)


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    return input_gradient(values, index, dy, out_dtype=dy.dtype)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    return values_gradient(index, dy, x, dtype=x.dtype, out_dtype=x.dtype)


def spmm_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dvalues and dbias, each where `needs` asks for it; those of values and bias straight from fp32 sums."""
    dx = spmm_t(values, index, dy) if needs[0] else None
    dtype = product_dtype(values, x)
    dvalues = values_gradient(index, dy, x, dtype=dtype, out_dtype=values.dtype) if needs[1] else None
    return dx, dvalues, bias_gradient(dy, values.dtype) if needs[2] else None


def grow_candidates(index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.schema`."""
    dtype = torch.promote_types(dy.dtype, x.dtype)
    return grow.grow_candidates(index, by_token(dy, dtype), by_token(x, dtype), k)
