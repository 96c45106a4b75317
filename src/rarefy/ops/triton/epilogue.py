"""What becomes of a product before it is stored: the activation of an MLP, forward and backward (`rarefy.ops.mlp`).

The activation's input z is kept as the CPU kernels keep it, in groups of 64 tokens, feature-major, and rounded to the
dtype it is kept in before it is used, so that the backward pass sees what the forward pass saw.

    keep               z = acc                          g of a gated MLP, whose rows come with the next product
    activate           z = acc,  y = act(z)
    gate               z = acc,  y = act(g) z           z after g, in one tensor
    activate_backward  y = acc act'(z),  second = act(z)
    gate_backward      y = acc z act'(g),  second = acc act(g),  third = act(g) z
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rarefy.ops.triton.activations import activate, slope
from rarefy.ops.triton.rows import rounded


@dataclass(frozen=True)
class Epilogue:
    """One of the above, for a product of H outputs."""

    kind: str
    activation: int
    """Place in `rarefy.ops.mlp.ACTIVATIONS`."""
    kept: Tensor
    """(groups, H or 2 H, 64)."""
    second: Tensor | None = None
    """(tokens, H), of y's dtype and strides."""
    third: Tensor | None = None


@triton.jit
def _store(out, value, mask):
    tl.store(out, rounded(value, out.dtype.element_ty), mask)


@triton.jit
def _kept(z, mask):
    return tl.load(z, mask, other=0.0).to(tl.float32)


@triton.jit
def finish(
    acc,
    y,
    second,
    third,
    kept,
    token,
    feature,
    is_token,
    y_token,
    kept_features,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Stores what follows from a tile of a product: acc (tokens, features), fp32, bias included."""
    mask = is_token[:, None]
    place = token[:, None] * y_token + feature[None, :]
    first = kept + ((token // 64)[:, None] * kept_features + feature[None, :]) * 64 + (token % 64)[:, None]
    if EPILOGUE == "keep":
        _store(first, acc, mask)
    elif EPILOGUE == "activate":
        z = rounded(acc, kept.dtype.element_ty)
        tl.store(first, z, mask)
        _store(y + place, activate(z.to(tl.float32), ACTIVATION), mask)
    elif EPILOGUE == "gate":
        z = rounded(acc, kept.dtype.element_ty)
        tl.store(first + kept_features // 2 * 64, z, mask)
        _store(y + place, activate(_kept(first, mask), ACTIVATION) * z.to(tl.float32), mask)
    elif EPILOGUE == "activate_backward":
        z = _kept(first, mask)
        _store(y + place, acc * slope(z, ACTIVATION), mask)
        _store(second + place, activate(z, ACTIVATION), mask)
    else:
        tl.static_assert(EPILOGUE == "gate_backward")
        g = _kept(first, mask)
        z = _kept(first + kept_features // 2 * 64, mask)
        act = activate(g, ACTIVATION)
        _store(y + place, acc * z * slope(g, ACTIVATION), mask)
        _store(second + place, acc * act, mask)
        _store(third + place, act * z, mask)


@triton.jit
def halves(acc, TOKENS: tl.constexpr, N: tl.constexpr):
    """A tile's left and right columns, (TOKENS, N / 2) each."""
    return tl.split(tl.permute(tl.reshape(acc, (TOKENS, 2, N // 2)), (0, 2, 1)))


@triton.jit
def finish_in_slices(
    acc,
    y,
    second,
    third,
    kept,
    token,
    first_feature,
    is_token,
    y_token,
    kept_features,
    TOKENS: tl.constexpr,
    N: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`finish`, a few columns at a time: z and what follows from it would not all find registers beside the sums."""
    half = tl.arange(0, N // 2) + first_feature
    left, right = halves(acc, TOKENS, N)
    finish(left, y, second, third, kept, token, half, is_token, y_token, kept_features, EPILOGUE, ACTIVATION)
    half += N // 2
    finish(right, y, second, third, kept, token, half, is_token, y_token, kept_features, EPILOGUE, ACTIVATION)
