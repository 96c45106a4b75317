"""Layer norm with the residual addition before it and autocast's cast behind it, for a network's own modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.nn.mlp import has_hooks
from rarefy.ops.layer_norm import add_layer_norm, runs_kernel


def add_norm(norm: nn.LayerNorm, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + delta (x itself where there is no delta), and norm of it; (..., C).

    Under autocast to bf16, on an fp32 stream, one operator does the addition, the norm and the cast that the layer
    behind it would begin with, in one pass over memory instead of three, and the norm is bf16. Elsewhere torch's own
    layers do as well, and the norm's dtype is what the module gives.

    Raises:
        ValueError: delta has another shape than x.
    """
    if _one_pass(norm, x, delta):
        assert norm.bias is not None
        return add_layer_norm(x, delta, norm.weight, norm.bias, eps=norm.eps, dtype=torch.bfloat16)
    if delta is not None:
        x = x + delta
    return x, norm(x)


def _one_pass(norm: nn.LayerNorm, x: Tensor, delta: Tensor | None) -> bool:
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):  # of some devices autocast knows nothing
        return False
    known = type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1 and norm.bias is not None
    if torch.get_autocast_dtype("cpu") != torch.bfloat16 or not known or has_hooks(norm):
        return False
    return runs_kernel(x, delta, torch.bfloat16)
