"""The operations on NVIDIA GPUs: blocks of 16, 32, 64 and 128, and row panels of 64 and 128 outputs, in Triton.

This file imports no triton, which comes with torch's CUDA builds and is optional; the others do (`operations` is what
a backend is). Where `TRITON_INTERPRET=1` was set before triton was imported, the kernels run on the CPU, slowly: that
is how they are tested without a GPU (docs/gpu.md).
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

SQUARES = (16, 32, 64, 128)
"""Sides of square blocks that have kernels."""
PANELS = (64, 128)
"""Heights of row panels that have kernels: blocks of (height, 1), so that so many outputs share a list of inputs."""

OLDEST = (8, 0)
"""Compute capability from which GPUs have bf16 products and asynchronous copies: Ampere."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of values and activations."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors, instead of being compiled."""
    return _installed() and os.environ.get("TRITON_INTERPRET") == "1"


def usable() -> bool:
    """Whether this machine can run the kernels at all."""
    return interpreted() or (_installed() and torch.cuda.is_available())


@functools.cache
def _too_old(index: int) -> str | None:
    """Why a GPU is not one that the kernels are written for."""
    if torch.cuda.get_device_capability(index) >= OLDEST:
        return None
    return f"the Triton kernels need an NVIDIA GPU of Ampere or newer, not {torch.cuda.get_device_name(index)}"


def is_panel(block: list[int]) -> bool:
    """Whether a block is a row panel."""
    return block[1] == 1 and block[0] in PANELS


def is_square(block: list[int]) -> bool:
    """Whether a block is one of the squares that have kernels."""
    return block[0] == block[1] and block[0] in SQUARES


def why_not(dtype: torch.dtype, device: torch.device, block: list[int]) -> str | None:
    """Why the kernels cannot run such values; None when they can."""
    if not _installed():
        return "triton is not installed (it comes with torch's CUDA builds; pip install triton)"
    if device.type != ("cpu" if interpreted() else "cuda"):
        return f"the Triton kernels run on {'the CPU, interpreted' if interpreted() else 'cuda'}, not on {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not {dtype}"
    if not is_square(block) and not is_panel(block):
        return (
            f"there is no Triton kernel for blocks of {block[0]}x{block[1]}: fast there are square blocks of "
            "16, 32, 64 and 128, and row panels of (64, 1) and (128, 1)"
        )
    return _too_old(device.index or 0) if device.type == "cuda" and torch.cuda.is_available() else None
