"""Layer norm with the residual addition before it, and the cast of autocast and the token shift behind it, for a
network's own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.nn.mlp import has_hooks
from rarefy.ops.layer_norm import add_layer_norm, runs_kernel, token_shift


def add_norm(
    norm: nn.LayerNorm, x: Tensor, delta: Tensor | None = None, *, shift: bool = False
) -> tuple[Tensor, Tensor]:
    """x + delta (x itself where there is no delta), and norm of it; (..., C), or (B, T, C) for a shift.

    Under autocast to bf16, on an fp32 stream, one operator does the addition, the norm and the cast that the layer
    behind it would begin with, in one pass over memory instead of three, and the norm is bf16. Elsewhere torch's own
    layers do as well, and the norm's dtype is what the module gives.

    Args:
        shift: the last C // 2 features of the norm are those of the token before (`rarefy.ops.token_shift`).
    Raises:
        ValueError: delta has another shape than x.
    """
    if _one_pass(norm, x, delta):
        assert norm.bias is not None
        return add_layer_norm(x, delta, norm.weight, norm.bias, eps=norm.eps, dtype=torch.bfloat16, shift=shift)
    if delta is not None:
        x = x + delta
    normed = norm(x)
    return x, token_shift(normed) if shift else normed


def _one_pass(norm: nn.LayerNorm, x: Tensor, delta: Tensor | None) -> bool:
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):  # of some devices autocast knows nothing
        return False
    known = type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 and norm.bias is not None
    if torch.get_autocast_dtype("cpu") != torch.bfloat16 or not known or has_hooks(norm):
        return False
    return runs_kernel(x, delta, torch.bfloat16)
