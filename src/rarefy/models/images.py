"""What the networks for images share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def image_batch(x: Tensor) -> Tensor:
    """(B, C, H, W) or (B, H, W) -> (B, C, H, W), channels_last: what convolutions are fastest on."""
    return (x if x.dim() == 4 else x.unsqueeze(1)).contiguous(memory_format=torch.channels_last)


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for one below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


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
