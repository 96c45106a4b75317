"""Values and activations as the kernels read them.

Half-precision activations are multiplied with values rounded to their dtype, fp32 ones in fp32 (TF32 where
`torch.set_float32_matmul_precision` allows it), and half-precision ones in 8-bit floats where
`rarefy.ops.fp8_products` asks for it; sums are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.triton import is_panel
from rarefy.ops.triton.factors import factors
from rarefy.ops.triton.panel import panel_input_gradient
from rarefy.ops.triton.product import Epilogue, product
from rarefy.ops.triton.sddmm import sddmm

ALIGNED = 16
"""Rows of so many entries are read in whole vectors; Triton asks for as much of a size before it relies on it."""


def product_dtype(values: Tensor, x: Tensor) -> torch.dtype:
    """Of both factors of a product."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.dtype if half else torch.promote_types(values.dtype, x.dtype)


def by_token(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(tokens, features) in this dtype, with contiguous rows."""
    tensor = tensor.detach().to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def by_feature(x: Tensor) -> Tensor:
    """(inputs, tokens): a panel reads single inputs, of many tokens each. Rows end in zeros, and begin aligned."""
    tokens, inputs = x.shape
    turned = x.new_empty(inputs, -(-tokens // ALIGNED) * ALIGNED)
    turned[:, :tokens].copy_(x.T)
    turned[:, tokens:].zero_()
    return turned


def forward(
    values: Tensor,
    index: Index,
    x: Tensor,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """x W^T + bias, or what the epilogue makes of it."""
    panel = is_panel(index.block)
    rows, weights, scale, _ = factors(by_token(x, product_dtype(values, x)), values, gradient=False)
    return product(
        by_feature(rows) if panel else rows,
        weights,
        None if bias is None else bias.detach().contiguous(),
        index.crow,
        index.cols,
        None,
        tokens=x.shape[0],
        outputs=index.block[0],
        side=index.block[1],
        out_dtype=out_dtype,
        by_feature=panel,
        scale=scale,
        epilogue=epilogue,
    )


def input_gradient(
    values: Tensor, index: Index, dy: Tensor, *, out_dtype: torch.dtype, epilogue: Epilogue | None = None
) -> Tensor:
    """dy W, or what the epilogue makes of it, which a panel cannot have."""
    rows, weights, scale, turned = factors(by_token(dy, product_dtype(values, dy)), values, gradient=True)
    if is_panel(index.block):
        assert epilogue is None
        return panel_input_gradient(index, weights, rows, out_dtype=out_dtype)
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
        out_dtype=out_dtype,
        turned=turned,
        scale=scale,
        epilogue=epilogue,
    )


def values_gradient(index: Index, dy: Tensor, x: Tensor, *, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """dy^T x at the units; both factors are taken in `dtype`."""
    panel, rows = is_panel(index.block), by_token(x, dtype)
    given = by_feature(rows) if panel else rows
    return sddmm(index, by_token(dy, dtype), given, out_dtype=out_dtype, by_feature=panel)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tokens, in fp32 before it is rounded."""
    return dy.detach().sum(dim=0, dtype=torch.float32).to(dtype)
