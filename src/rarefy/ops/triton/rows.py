"""Where a kernel finds units: the row of one by its position, and features of several at once."""

from __future__ import annotations

import triton
import triton.language as tl


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
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b, accumulated in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
