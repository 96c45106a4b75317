"""dx = dy W for row panels, whose columns each have a list of panels of their own: two deterministic steps.

First every unit's product with its panel of dy, a dense tile a panel; then, column by column, the sum over the units
by the transposed index, in order. The products are fp32 and of a few tokens at a time, so that they stay in the L2
cache: memory is O(tile), not O(units * tokens).
"""

# Kernels are in Triton's language, which is not quite Python.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.triton import device
from rarefy.ops.triton.rows import dot, rounded, row_of
from rarefy.ops.triton.tuning import bucket, tuned

PRODUCT_BYTES = 24 << 20
"""Of products at a time: half of an H100's L2 cache."""


@tuned(
    [
        triton.Config({"UNITS": units, "TOKENS": tokens}, num_warps=warps, num_stages=1)
        for units, tokens, warps in [(32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)]
    ],
    key=["units_key", "tokens_key", "BR"],
    interpreted={"UNITS": 32, "TOKENS": 32},
)
@triton.jit(do_not_specialize=["units_key", "tokens_key"])
def unit_products_kernel(
    dy,
    values,
    products,
    crow,
    num_rows,
    num_units,
    num_tokens,
    dy_token,
    units_key,
    tokens_key,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    m = tl.arange(0, BR)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_token = token < num_tokens
    unit = tl.program_id(0) * UNITS
    last = tl.minimum(unit + UNITS, num_units)
    first = unit
    while unit < last:  # once for each panel that has units here
        row = row_of(crow, num_rows, unit)
        stop = tl.minimum(last, tl.load(crow + row + 1))
        units = first + tl.arange(0, UNITS)
        mine = (units >= unit) & (units < stop)
        place = units.to(tl.int64)
        v = tl.load(values + place[:, None] * BR + m[None, :], mine[:, None], other=0.0)
        g = tl.load(dy + token[None, :] * dy_token + (row * BR + m)[:, None], is_token[None, :], other=0.0)
        acc = dot(v, g, tl.zeros((UNITS, TOKENS), dtype=tl.float32), PRECISION)
        known = mine[:, None] & is_token[None, :]
        tl.store(products + place[:, None] * num_tokens + token[None, :], acc, known)
        unit = stop


@tuned(
    [
        triton.Config({"COLUMNS": columns, "TOKENS": tokens}, num_warps=4, num_stages=3)
        for columns, tokens in [(16, 64), (32, 64), (32, 128), (64, 64)]
    ],
    key=["units_key", "tokens_key"],
    interpreted={"COLUMNS": 16, "TOKENS": 32},
)
@triton.jit(do_not_specialize=["units_key", "tokens_key"])
def column_sums_kernel(
    products,
    dx,
    t_crow,
    t_perm,
    num_columns,
    num_tokens,
    dx_token,
    units_key,
    tokens_key,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_token = token < num_tokens
    begin = tl.load(t_crow + column, is_column, other=0)
    length = tl.load(t_crow + column + 1, is_column, other=0) - begin
    acc = tl.zeros((COLUMNS, TOKENS), dtype=tl.float32)
    for at in range(tl.max(length, axis=0)):
        exists = at < length
        unit = tl.load(t_perm + begin + at, exists, other=0).to(tl.int64)
        known = exists[:, None] & is_token[None, :]
        acc += tl.load(products + unit[:, None] * num_tokens + token[None, :], known, other=0.0)
    out = dx + token[:, None] * dx_token + column[None, :]
    tl.store(out, rounded(tl.trans(acc), dx.dtype.element_ty), is_token[:, None] & is_column[None, :])


def _tokens_at_a_time(units: int, tokens: int) -> int:
    """A multiple of 128 that PRODUCT_BYTES allow; a function of sizes alone, so that graphs survive rewires."""
    allowed = PRODUCT_BYTES // (4 * max(1, units)) // 128 * 128
    return max(128, min(allowed, -(-tokens // 128) * 128))


def panel_input_gradient(index: Index, values: Tensor, dy: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """(tokens, inputs) from dy (tokens, outputs), rows contiguous, and values (units, b_r, 1) of its dtype."""
    tokens, units, columns = dy.shape[0], index.num_units, index.in_features
    dx = torch.empty(tokens, columns, dtype=out_dtype, device=dy.device)
    step = _tokens_at_a_time(units, tokens)
    products = torch.empty(units * min(step, tokens), dtype=torch.float32, device=dy.device)
    units_key = bucket(units)
    with device.guard(dy):
        for first in range(0, tokens, step):
            part, target = dy[first : first + step], dx[first : first + step]
            count = part.shape[0]
            if units:
                unit_products_kernel.launch(
                    lambda meta, count=count: (triton.cdiv(units, meta["UNITS"]), triton.cdiv(count, meta["TOKENS"])),
                    part,
                    values,
                    products,
                    index.crow,
                    index.crow.shape[0] - 1,
                    units,
                    count,
                    dy.stride(0),
                    units_key,
                    bucket(count),
                    BR=index.block[0],
                    PRECISION=device.precision(dy.dtype),
                )
            column_sums_kernel.launch(
                lambda meta, count=count: (triton.cdiv(columns, meta["COLUMNS"]), triton.cdiv(count, meta["TOKENS"])),
                products,
                target,
                index.t_crow,
                index.t_perm,
                columns,
                count,
                dx.stride(0),
                units_key,
                bucket(count),
            )
    return dx
