"""dW = dy^T x at the units: a program takes a few neighbouring units of a row, and all tokens or a part of them.

Every unit is written once, by one program; where there are too few units to fill the GPU, tokens are split and the
parts added in order. So it is deterministic, and no atomic.
"""

# Kernels are in Triton's language, which is not quite Python.
# pyright: reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.triton import device
from rarefy.ops.triton.rows import dot, features_of, rounded, row_of
from rarefy.ops.triton.tuning import bucket, tuned

SPLIT_TOKENS = 512
"""Fewer tokens are not worth a program of their own."""

MOST_SPLITS = 16
"""Parts whose sums are kept apart until they are added, as many times the gradient's memory."""

_CONFIGS = [
    triton.Config({"WIDTH": width, "TOKENS": tokens}, num_warps=warps, num_stages=stages)
    for width, tokens, warps, stages in [
        (64, 32, 4, 4),
        (64, 64, 4, 4),
        (64, 128, 4, 3),
        (128, 32, 4, 4),
        (128, 64, 4, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (256, 32, 8, 3),
        (256, 64, 8, 3),
    ]
]


@tuned(_CONFIGS, key=["tokens_key", "units_key", "BR", "BC"], interpreted={"WIDTH": 32, "TOKENS": 32})
@triton.jit(do_not_specialize=["tokens_key", "units_key"])
def sddmm_kernel(
    dy,
    x,
    out,
    crow,
    cols,
    num_rows,
    num_units,
    num_tokens,
    x_tokens,
    split_tokens,
    dy_token,
    x_token,
    x_feature,
    tokens_key,
    units_key,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # WIDTH columns of the gradient, of as many neighbouring units as they hold; a wide unit is never split.
    UNITS: tl.constexpr = WIDTH // BC if WIDTH > BC else 1
    TURNED: tl.constexpr = BR < 64  # a Hopper tensor core takes 64 rows or more
    entry = tl.arange(0, UNITS * BC)
    inner = entry % BC
    m = tl.arange(0, BR)
    begin = tl.program_id(1) * split_tokens
    end = tl.minimum(begin + split_tokens, num_tokens)
    out += tl.program_id(1).to(tl.int64) * num_units * (BR * BC)
    unit = tl.program_id(0) * UNITS
    last = tl.minimum(unit + UNITS, num_units)
    while unit < last:  # once for each row that has units here, mostly once
        row = row_of(crow, num_rows, unit)
        stop = tl.minimum(last, tl.load(crow + row + 1))
        units = unit + entry // BC
        exists = units < stop
        feature = features_of(tl.load(cols + units, exists, other=0), inner, BC)
        acc = tl.zeros((UNITS * BC, BR) if TURNED else (BR, UNITS * BC), dtype=tl.float32)
        for at in range(begin, end, TOKENS):
            token = (at + tl.arange(0, TOKENS)).to(tl.int64)
            is_token = token < end
            g = tl.load(dy + token[:, None] * dy_token + (row * BR + m)[None, :], is_token[:, None], other=0.0)
            known = (token < x_tokens)[:, None] & exists[None, :]  # what is not of this part, g makes zero
            a = tl.load(x + token[:, None] * x_token + feature[None, :] * x_feature, known, other=0.0)
            if TURNED:
                acc = dot(tl.trans(a), g, acc, PRECISION)
            else:
                acc = dot(tl.trans(g), a, acc, PRECISION)
        if TURNED:
            acc = tl.trans(acc)
        place = units.to(tl.int64) * (BR * BC) + inner
        tl.store(out + m[:, None] * BC + place[None, :], rounded(acc, out.dtype.element_ty), exists[None, :])
        unit = stop


def _split_tokens(units: int, tokens: int, processors: int) -> int:
    """Tokens of a part: so many that every processor has work, by sizes alone. A multiple of 16, for whole vectors."""
    wanted = max(1, min(2 * processors // max(1, units), MOST_SPLITS))
    return max(SPLIT_TOKENS, -(-tokens // (16 * wanted)) * 16)


def sddmm(index: Index, dy: Tensor, x: Tensor, *, out_dtype: torch.dtype, by_feature: bool = False) -> Tensor:
    """(units, b_r, b_c).

    Args:
        dy: (tokens, outputs), rows contiguous.
        x: (tokens, inputs), or if `by_feature` (inputs, tokens, and zeros beyond them); of the same dtype.
    """
    b_r, b_c = index.block
    tokens, units = dy.shape[0], index.num_units
    split_tokens = _split_tokens(units * b_c // max(b_c, 128), tokens, device.num_processors(x))
    splits = max(1, -(-tokens // split_tokens))
    dtype = out_dtype if splits == 1 else torch.float32
    parts = torch.empty(splits, units, b_r, b_c, dtype=dtype, device=x.device)
    if not units:
        return parts[0].to(out_dtype)
    x_token, x_feature = (x.stride(1), x.stride(0)) if by_feature else (x.stride(0), x.stride(1))
    with device.guard(x):
        sddmm_kernel.launch(
            lambda meta: (triton.cdiv(units, max(1, meta["WIDTH"] // b_c)), splits),
            dy,
            x,
            parts,
            index.crow,
            index.cols,
            index.crow.shape[0] - 1,
            units,
            tokens,
            x.shape[1] if by_feature else tokens,
            split_tokens,
            dy.stride(0),
            x_token,
            x_feature,
            bucket(tokens),
            bucket(units),
            BR=b_r,
            BC=b_c,
            PRECISION=device.precision(x.dtype),
        )
    return (parts[0] if splits == 1 else parts.sum(dim=0)).to(out_dtype)
