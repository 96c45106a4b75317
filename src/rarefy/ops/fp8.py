"""Products of 8-bit factors, on GPUs that multiply them: the user's choice, as it costs precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rarefy.ops import triton

CAPABILITY = (8, 9)
"""Compute capability from which tensor cores multiply 8-bit floats: Ada, then Hopper."""

_wanted = False


@contextmanager
def fp8_products() -> Iterator[None]:
    """Inside, with half-precision activations on a GPU, blocks of 16 to 128 are multiplied in 8-bit floats, forward and
    for the gradient of the input. Around a whole training step: its backward pass asks too.

    Both factors are divided by their largest magnitude and rounded: values and activations to e4m3 (three bits of
    mantissa), gradients of outputs to e5m2 (two). What tensor cores make of 32 to 128 products, which is less than fp32
    exact, is summed in fp32 on Hopper, and multiplied back (Micikevicius et al. 2022, arXiv:2209.05433, with the scale
    of the tensor at hand). Gradients of values keep their half-precision factors, and row panels do. Costs a pass over
    each factor, for its largest magnitude, and one that rounds it.

    Raises:
        ValueError: no GPU is at hand that multiplies them, nor Triton's interpreter, where they are emulated.
    """
    global _wanted
    if (reason := why_not()) is not None:
        raise ValueError(f"products in fp8 {reason}; leave fp8_products out, and they run in half precision")
    before, _wanted = _wanted, True
    try:
        yield
    finally:
        _wanted = before


def wanted() -> bool:
    """Whether the user asked for them, here and now."""
    return _wanted


def why_not() -> str | None:
    """Why this machine cannot compute in fp8; None if it can."""
    if triton.interpreted():
        return None
    if not triton.usable():
        return "need a GPU and triton"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"need a GPU of Ada, Hopper or newer, not {torch.cuda.get_device_name()}"
    return None


def scaled(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor over its scale, contiguous, and the scale, () float32: the largest magnitude becomes the dtype's."""
    limit = torch.finfo(dtype).max
    largest = tensor.abs().amax().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)
    scale = (largest / limit).clamp_(min=torch.finfo(torch.float32).tiny)
    return (tensor.float() / scale).to(dtype).contiguous(), scale
