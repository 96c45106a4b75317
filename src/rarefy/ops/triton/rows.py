"""What kernels share: where units are found, and arithmetic that is right in the interpreter too."""

from __future__ import annotations

import triton
import triton.language as tl

from rarefy.ops.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())
"""The interpreter (Triton 3.7 to 3.9) multiplies bf16 wrongly, and cuts off where it should round to bf16."""


@triton.jit
def row_of(crow, num_rows, unit):
    """The row that holds the unit at this position: the last whose pointer is not past it. O(log rows)."""
    low = unit * 0
    high = low + num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(crow + middle) <= unit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def features_of(columns, inner, SIDE: tl.constexpr):
    """Entries column * SIDE + inner. Consecutive in runs of SIDE, which the compiler cannot know."""
    features = columns.to(tl.int64) * SIDE + inner
    if SIDE > 1:
        features = tl.max_contiguous(tl.multiple_of(features, SIDE), SIDE)
    return features


@triton.jit
def int32_of(halves, at, mask):
    """The int32 at a place of an array seen as uint16.

    Inside a pipelined loop Triton would copy int32 ahead asynchronously, and make every other copy wait for that one.
    Loads of two bytes it leaves as they are: mostly hits of the L1 cache.
    """
    low = tl.load(halves + 2 * at, mask, other=0).to(tl.int32)
    return low + (tl.load(halves + 2 * at + 1, mask, other=0).to(tl.int32) << 16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in fp32. Of a sum of 8-bit products Hopper's tensor cores keep some 14 bits, so that of
    one tile is added to `acc` outside of them.
    """
    if a.dtype.primitive_bitwidth == 8:
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 rounded to the nearest of another dtype."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        even = bits + (0x7FFF + ((bits >> 16) & 1))
        value = tl.where(value == value, (even & 0xFFFF0000).to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)
