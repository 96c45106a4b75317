"""Rotary positions (Su et al. 2021, arXiv:2104.09864, section 3.4): pairs of a head's features turn with the position.

Feature f of the first half and of the second are a pair; at position t it turns by the angle t * base^(-2 f / c), so
that the score of a query and a key depends on how far apart they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    positions: int, head_dim: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> Tensor:
    """(positions, head_dim) float32: for each position head_dim / 2 cosines and as many sines.

    Raises:
        ValueError: an odd head_dim, which leaves a feature without a pair.
    """
    if head_dim % 2 != 0:
        raise ValueError(f"rotary positions turn pairs of features, and a head of {head_dim} has an odd one out")
    turns = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * turns
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device, torch.float32)


def rotate(x_BTHc: Tensor, table_Tc: Tensor) -> Tensor:
    """(B, T, H, c) queries or keys, turned by their positions' rows of the table; computed in float32 or wider."""
    half = x_BTHc.shape[-1] // 2
    wide = torch.promote_types(x_BTHc.dtype, torch.float32)
    cosine, sine = table_Tc.to(wide)[:, None].split(half, dim=-1)
    first, second = x_BTHc.to(wide).split(half, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x_BTHc.dtype)
