"""What the networks for images share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", int, float)


def image_batch(x: Tensor) -> Tensor:
    """(B, C, H, W) or (B, H, W) -> (B, C, H, W), channels_last: what convolutions are fastest on."""
    return (x if x.dim() == 4 else x.unsqueeze(1)).contiguous(memory_format=torch.channels_last)


ONEDNN_LANES = 16
"""With fewer input channels than a vector has lanes (AVX-512: 16, AVX2: 8), oneDNN's weight gradient of a 1x1
convolution with a stride writes past its workspace on channels_last images: wrong numbers, or a damaged heap
(https://github.com/uxlfoundation/oneDNN/issues/6035)."""


def skip_strides(inputs: int, stride: int) -> tuple[int, int]:
    """(step of the pixels that a 1x1 skip is given, stride of its convolution): together `stride`, and the convolution
    has none where oneDNN would be wrong.
    """
    return (stride, 1) if inputs < ONEDNN_LANES else (1, stride)


def every(step: int, x: Tensor) -> Tensor:
    """(B, C, H, W) -> every `step`-th pixel of rows and columns."""
    return x if step == 1 else x[:, :, ::step, ::step]


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for one below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def per_stage(width: N | Sequence[N], stages: int) -> tuple[N, ...]:
    """The width of each stage: the one that all have, or those given.

    Raises:
        ValueError: one is not positive, or there are not as many as stages.
    """
    widths = tuple(width) if isinstance(width, Sequence) else (width,) * stages
    if len(widths) != stages:
        raise ValueError(f"width must be one number or {stages}, one a stage, got {len(widths)}: {list(widths)}")
    if not all(one > 0 for one in widths):
        raise ValueError(f"width must be positive, got {width}")
    return widths


def draw_he(model: nn.Module, generator: torch.Generator | None) -> None:
    """Fresh weights as in He et al. 2015 (arXiv:1502.01852): normal, of variance 2 / fan-in for convolutions, and
    1 / fan-in for the logits; biases 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in, gain = module.weight[0].numel(), math.sqrt(2) if isinstance(module, nn.Conv2d) else 1.0
            nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
