"""Patterns of two units in every four on sparse tensor cores, through torch's kernels (cuSPARSELt).

Forward, and the gradient of the input where columns have two in four as well, are sparse products, of at most twice a
dense one's speed. The gradient of the values is a dense product whose entries at the units are kept: hardware has no
other. A product expands the values in the activations' dtype, which one pass over them does, and has the result
compressed: the format is the library's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rarefy.ops import expanded, tiled, two_four
from rarefy.ops.index import Index
from rarefy.ops.triton import device
from rarefy.ops.triton.tuning import tuned

__all__ = ["grow_candidates", "sddmm", "spmm", "spmm_backward", "spmm_t"]

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes of activations that the products take; others are multiplied dense."""

TOKENS = 8
"""What the number of tokens must be a multiple of."""

_compress, _multiply = torch.ops.aten._cslt_compress, torch.ops.aten._cslt_sparse_mm

grow_candidates = tiled.grow_candidates
sddmm = expanded.sddmm


@tuned([triton.Config({"FOURS": 512}, num_warps=4)], interpreted={"FOURS": 64})
@triton.jit
def expand_kernel(values, places, permutation, out, fours, PERMUTED: tl.constexpr, FOURS: tl.constexpr):
    """out[4 f + places % 4] = values, two for every f, and zero elsewhere."""
    four = tl.program_id(0).to(tl.int64) * FOURS + tl.arange(0, FOURS)
    mask = four < fours
    first_at, second_at = 2 * four, 2 * four + 1
    first_place = tl.load(places + first_at, mask, other=0).to(tl.int32) % 4
    second_place = tl.load(places + second_at, mask, other=0).to(tl.int32) % 4
    if PERMUTED:
        first_at = tl.load(permutation + first_at, mask, other=0)
        second_at = tl.load(permutation + second_at, mask, other=0)
    first = tl.load(values + first_at, mask, other=0.0)
    second = tl.load(values + second_at, mask, other=0.0)
    column = tl.arange(0, 4)[None, :]
    entries = tl.where(column == second_place[:, None], second[:, None], tl.zeros_like(second)[:, None])
    entries = tl.where(column == first_place[:, None], first[:, None], entries)
    tl.store(out + four[:, None] * 4 + column, entries, mask[:, None])


def expand(values: Tensor, places: Tensor, permutation: Tensor | None, lines: int) -> Tensor:
    """(lines, length) with `values` at two places in every four.

    Args:
        values: (units,) in the dtype of the result.
        places: (units,) of each unit in its line, in order.
        permutation: (units,) where the value of each unit stands; None: in order.
    """
    out = values.new_empty(lines, 2 * values.shape[0] // lines)
    fours = values.shape[0] // 2
    with device.guard(values):
        expand_kernel.launch(
            lambda meta: (triton.cdiv(fours, meta["FOURS"]),),
            values,
            places,
            places if permutation is None else permutation,
            out,
            fours,
            PERMUTED=permutation is not None,
        )
    return out


def _product(weight: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """rows (tokens, length) times the transpose of a (lines, length) weight of two in four, plus bias."""
    tokens = rows.shape[0]
    if not tokens:
        return rows.new_empty(0, weight.shape[0])
    rows = F.pad(rows, (0, 0, 0, -tokens % TOKENS)).contiguous()
    return _multiply(_compress(weight), rows.T, bias, transpose_result=True)[:tokens]


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    if x.dtype not in HALVES:
        return expanded.spmm(values, index, x, bias)
    weight = expand(values.detach().to(x.dtype), index.cols, None, index.out_features)
    return _product(weight, x.detach(), None if bias is None else bias.detach().to(x.dtype))


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    if dy.dtype not in HALVES or not two_four.by_column(index):
        return expanded.spmm_t(values, index, dy)
    turned = expand(values.detach().to(dy.dtype), index.t_rows, index.t_perm, index.in_features)
    return _product(turned, dy.detach(), None)


def spmm_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dvalues and dbias, each where `needs` asks for it."""
    dx = spmm_t(values, index, dy) if needs[0] else None
    return dx, *expanded.spmm_backward(values, index, dy, x, [False, *needs[1:]])[1:]
