"""Activations and their slopes, in fp32 and in registers. Numbers are places in `rarefy.ops.mlp.ACTIVATIONS`."""

from __future__ import annotations

import triton
import triton.language as tl

GELU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
SILU = tl.constexpr(2)
RELU = tl.constexpr(3)


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _tanh_inside(z):
    """tanh(sqrt(2 / pi) (z + 0.044715 z^3)), by the sigmoid."""
    return 2.0 * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z)) - 1.0


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == GELU:
        return z * _normal_cdf(z)
    elif ACTIVATION == GELU_TANH:
        return 0.5 * z * (1.0 + _tanh_inside(z))
    elif ACTIVATION == SILU:
        return z * tl.sigmoid(z)
    else:
        h = tl.where(z <= 0.0, 0.0, z)  # what is not a number stays so
        if ACTIVATION == RELU:
            return h
        else:
            return h * h


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """act'(z)."""
    if ACTIVATION == GELU:
        return _normal_cdf(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == GELU_TANH:
        t = _tanh_inside(z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == SILU:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == RELU:
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        return tl.where(z > 0.0, 2.0 * z, 0.0)
