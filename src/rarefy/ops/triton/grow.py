"""The best absent units by pooled gradient: mean |dy^T x| a unit, a few unit rows at a time, nothing else kept.

Neither the dense gradient nor a list of absent units exists, and nothing is read back to the CPU: sizes depend on the
shape and k alone.
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
from rarefy.ops.triton.rows import dot
from rarefy.ops.triton.tuning import bucket, tuned

SCORES = 1 << 20
"""Scores at a time: 4 MiB, and 8 more while they are sorted."""

PRECISION = "tf32x3"
"""Of fp32 factors: each the sum of two TF32 numbers, on tensor cores. What was bf16 before is exact so, the rest to
2^-21, far below what tells one score from the next."""


@tuned(
    [
        triton.Config({"WIDTH": width, "TOKENS": tokens}, num_warps=warps, num_stages=stages)
        for width, tokens, warps, stages in [(128, 32, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (256, 32, 8, 3)]
    ],
    key=["tokens_key", "BR", "BC"],
    interpreted={"WIDTH": 64, "TOKENS": 32},
)
@triton.jit(do_not_specialize=["tokens_key", "first_row"])
def unit_scores_kernel(
    dy,
    x,
    scores,
    first_row,
    num_cols,
    num_tokens,
    dy_token,
    x_token,
    tokens_key,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    UNITS: tl.constexpr = WIDTH // BC if WIDTH > BC else 1
    at_row = tl.program_id(1)
    m = (first_row + at_row) * BR + tl.arange(0, BR)
    feature = tl.program_id(0) * UNITS * BC + tl.arange(0, UNITS * BC)
    exists = feature < num_cols * BC
    acc = tl.zeros((BR, UNITS * BC), dtype=tl.float32)
    for at in range(0, num_tokens, TOKENS):
        token = (at + tl.arange(0, TOKENS)).to(tl.int64)
        is_token = token < num_tokens
        g = tl.load(dy + token[:, None] * dy_token + m[None, :], is_token[:, None], other=0.0)
        known = is_token[:, None] & exists[None, :]
        a = tl.load(x + token[:, None] * x_token + feature[None, :], known, other=0.0)
        acc = dot(tl.trans(g), a, acc, PRECISION)
    pooled = tl.sum(tl.sum(tl.reshape(tl.abs(acc), (BR, UNITS, BC)), axis=2), axis=0) / (BR * BC)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    tl.store(scores + at_row * num_cols + unit, pooled, unit < num_cols)


@tuned([triton.Config({"COUNT": 128}, num_warps=1)], interpreted={"COUNT": 16})
@triton.jit(do_not_specialize=["first_row"])
def mark_active_kernel(scores, crow, cols, first_row, num_cols, COUNT: tl.constexpr):
    """-inf at the units that exist: no score is as low."""
    at_row = tl.program_id(0)
    begin = tl.load(crow + first_row + at_row)
    end = tl.load(crow + first_row + at_row + 1)
    for at in range(begin, end, COUNT):
        unit = at + tl.arange(0, COUNT)
        exists = unit < end
        col = tl.load(cols + unit, exists, other=0).to(tl.int32)
        tl.store(scores + at_row * num_cols + col, float("-inf"), exists)


def _keys(scores: Tensor, units: Tensor) -> Tensor:
    """int64 that order by score, then by lower unit (rewiring rule 6.2); no two are equal."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) + (0xFFFFFFFF - units)


def _read(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Units and scores of keys."""
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), scores


def grow_candidates(index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.schema`; dy (tokens, outputs) and x (tokens, inputs) have contiguous rows and one dtype."""
    (b_r, b_c), tokens = index.block, dy.shape[0]
    rows, cols = index.crow.shape[0] - 1, index.t_crow.shape[0] - 1
    k = min(k, rows * cols - index.num_units)
    best = torch.empty(0, dtype=torch.int64, device=x.device)
    step = max(1, SCORES // max(1, cols))
    for first in range(0, rows if k else 0, step):
        count = min(step, rows - first)
        scores = torch.empty(count, cols, dtype=torch.float32, device=x.device)
        with device.guard(x):
            unit_scores_kernel.launch(
                lambda meta, count=count: (triton.cdiv(cols, max(1, meta["WIDTH"] // b_c)), count),
                dy,
                x,
                scores,
                first,
                cols,
                tokens,
                dy.stride(0),
                x.stride(0),
                bucket(tokens),
                BR=b_r,
                BC=b_c,
                PRECISION=PRECISION,
            )
            # What is not finite shows among the best: rewiring rule 8.3 needs to see it.
            torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, out=scores)
            mark_active_kernel.launch(lambda meta, count=count: (count,), scores, index.crow, index.cols, first, cols)
        units = torch.arange(first * cols, (first + count) * cols, device=x.device)
        best = torch.cat([best, _keys(scores.flatten(), units)])
        best = best.topk(min(k, best.shape[0])).values
    return _read(best)
