"""The precisions that a layer can train in, as settings around it: set for one lap, and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from rarefy import probe

Precision = Literal["fp32", "medium", "bf16"]
"""fp32: full. medium: `torch.set_float32_matmul_precision("medium")`, fp32 tensors that products may read as
bf16. bf16: autocast, bf16 activations and gradients of activations, fp32 weights."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def precision_now() -> Precision:
    """What torch is set to, here and now."""
    if torch.is_autocast_enabled("cpu"):
        return "bf16"
    return "medium" if torch.get_float32_matmul_precision() == "medium" else "fp32"


@contextlib.contextmanager
def working_in(precision: Precision, *, autocast: bool = True, device: str = "cpu") -> Iterator[None]:
    """Set what torch reads of a precision, and put it back.

    Args:
        autocast: False in a backward pass, which a loop runs outside of autocast.
        device: type of the device that computes.
    """
    before, wanted = torch.get_float32_matmul_precision(), "medium" if precision == "medium" else "highest"
    cast = autocast and precision == "bf16"
    if before != wanted:  # setting it takes some microseconds, which a small product would notice
        torch.set_float32_matmul_precision(wanted)
    try:
        with torch.autocast(device, torch.bfloat16) if cast else contextlib.nullcontext():
            yield
    finally:
        if before != wanted:
            torch.set_float32_matmul_precision(before)


def activation_dtype(precision: Precision) -> torch.dtype:
    """Of a layer's input and of its output's gradient."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def dense_precisions() -> tuple[Precision, ...]:
    """Those that a dense layer is worth timing in here.

    Without bf16 products in hardware torch takes many times longer for them, and "medium" changes nothing.
    """
    return PRECISIONS if probe.dense_has_bf16() else ("fp32",)
