"""The four operations and the backward pass of one, as `rarefy.ops` calls a backend.

Half-precision activations are multiplied with values rounded to their dtype, fp32 ones in fp32 (TF32 where
`torch.set_float32_matmul_precision` allows it); sums are fp32. Gradients of values come from those sums in the values'
own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.triton import grow, is_panel
from rarefy.ops.triton import sddmm as sampled
from rarefy.ops.triton.panel import panel_input_gradient
from rarefy.ops.triton.product import product

ALIGNED = 16
"""Rows of so many entries are read in whole vectors; Triton asks for as much of a size before it relies on it."""


def _product_dtype(values: Tensor, x: Tensor) -> torch.dtype:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.dtype if half else torch.promote_types(values.dtype, x.dtype)


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, with contiguous rows: what the kernels read."""
    tensor = tensor.detach().to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _by_feature(x: Tensor) -> Tensor:
    """(inputs, tokens): a panel reads single inputs, of many tokens each. Rows end in zeros, and begin aligned."""
    tokens, inputs = x.shape
    by_feature = x.new_empty(inputs, -(-tokens // ALIGNED) * ALIGNED)
    by_feature[:, :tokens].copy_(x.T)
    by_feature[:, tokens:].zero_()
    return by_feature


def _values(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to(dtype).contiguous()


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    dtype, panel = _product_dtype(values, x), is_panel(index.block)
    rows = _rows(x, dtype)
    return product(
        _by_feature(rows) if panel else rows,
        _values(values, dtype),
        None if bias is None else bias.detach().contiguous(),
        index.crow,
        index.cols,
        None,
        tokens=x.shape[0],
        outputs=index.block[0],
        side=index.block[1],
        out_dtype=x.dtype,
        by_feature=panel,
    )


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    dtype = _product_dtype(values, dy)
    rows, weights = _rows(dy, dtype), _values(values, dtype)
    if is_panel(index.block):
        return panel_input_gradient(index, weights, rows, out_dtype=dy.dtype)
    return product(
        rows,
        weights,
        None,
        index.t_crow,
        index.t_rows,
        index.t_perm,
        tokens=dy.shape[0],
        outputs=index.block[1],
        side=index.block[0],
        out_dtype=dy.dtype,
    )


def _value_gradient(index: Index, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    panel = is_panel(index.block)
    return sampled.sddmm(index, dy, _by_feature(x) if panel else x, out_dtype=dtype, by_feature=panel)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    return _value_gradient(index, _rows(dy, x.dtype), _rows(x, x.dtype), x.dtype)


def spmm_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dvalues and dbias, each where `needs` asks for it."""
    dtype = _product_dtype(values, x)
    dy = _rows(dy, dy.dtype)
    dx = spmm_t(values, index, dy) if needs[0] else None
    dvalues = _value_gradient(index, _rows(dy, dtype), _rows(x, dtype), values.dtype) if needs[1] else None
    dbias = dy.sum(dim=0, dtype=torch.float32).to(values.dtype) if needs[2] else None
    return dx, dvalues, dbias


def grow_candidates(index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.schema`."""
    dtype = torch.promote_types(dy.dtype, x.dtype)
    return grow.grow_candidates(index, _rows(dy, dtype), _rows(x, dtype), k)
