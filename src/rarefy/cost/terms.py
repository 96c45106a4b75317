"""The physical terms that a layer's time is a sum of.

Each is an amount of work that the shape, the pattern and the tokens determine; what a unit of it takes is fitted
(rarefy.cost.model). Here those of linear layers: O x I the matrix, N its nonzeros, b entries a unit, T tokens.
"""

from __future__ import annotations

import math

from rarefy.cost.batching import DEFAULT, Batching
from rarefy.cost.conv_terms import FRESH_BYTES, dense_conv_terms, sparse_conv_terms
from rarefy.cost.precision import activation_dtype
from rarefy.cost.work import Pass, Work

PANEL = 64
"""Tokens that the kernels handle at a time: T counts in whole panels."""

FEW = 3
"""Panels up to which a call is done without tiles; the tiles' own start is what these take together."""

LONG = 512
"""Features up to which a panel's rows stay near; beyond, each doubling costs the kernel anew."""


def terms(work: Work, which: Pass, l2_bytes: int, batching: Batching = DEFAULT) -> dict[str, float]:
    """Name -> amount. The same names for all work of one kind.

    Args:
        l2_bytes: cache of a core, beyond which activations come from further away.
        batching: how convolutions share out images.
    """
    if work.convolves:
        if work.block is None:
            return dense_conv_terms(work, which, l2_bytes)
        return sparse_conv_terms(work, which, l2_bytes, batching)
    return _dense_terms(work, which, l2_bytes) if work.block is None else _sparse_terms(work, which, l2_bytes)


def _sparse_terms(work: Work, which: Pass, l2_bytes: int) -> dict[str, float]:
    assert work.block is not None
    (out, inputs), width = work.shape, activation_dtype(work.precision).itemsize
    tokens = -(-work.tokens // PANEL) * PANEL
    grid = out * inputs / (work.block[0] * work.block[1])
    panel = max(out, inputs) if which == "step" else inputs  # the backward reads both by feature, the forward x alone
    return {
        "call": 1.0,
        "first_panels": min(tokens, FEW * PANEL),
        "pack_out": out * tokens,
        "pack_in": inputs * tokens,
        "products": work.nnz * tokens,
        "far_products": work.nnz * tokens * max(0.0, math.log2(panel / LONG)),
        "pattern": work.nnz,
        "grid": grid,
        "segments": grid * tokens,  # starts of a row in a tile of columns, empty or not
        "beyond_cache": sum(max(0, side * work.tokens * width - l2_bytes) for side in work.shape),
    }


def _dense_terms(work: Work, which: Pass, l2_bytes: int) -> dict[str, float]:
    (out, inputs), tokens, width = work.shape, work.tokens, activation_dtype(work.precision).itemsize
    made = [out * tokens * width]
    if which == "step":
        made += [inputs * tokens * width, out * inputs * 4]
    moved = out * inputs * 4 + (out + inputs) * tokens * width
    return {
        "call": 1.0,
        "move_out": out * tokens,
        "move_in": inputs * tokens,
        "weights": out * inputs,
        "products": work.nnz * tokens,
        "fresh": sum(size for size in made if size >= FRESH_BYTES),
        "beyond_cache": max(0, moved - 2 * l2_bytes),
    }
