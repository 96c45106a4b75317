"""Two linear layers with an activation between them, computed as one where both are sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.nn.linear import SparseLinear
from rarefy.ops.mlp import activate


def mlp(x: Tensor, up: nn.Module, activation: str, down: nn.Module) -> Tensor:
    """down(act(up(x))): as one call of the kernels if both layers are SparseLinear, else one after the other.

    Args:
        x: (..., in_features).
        up, down: nn.Linear, SparseLinear or anything like them.
        activation: "gelu", "gelu_tanh", "silu", "relu" or "squared_relu".

    As one call, the hidden activations stay in cache, and of them only the activation's inputs are kept for the backward
    pass: in bf16 under autocast or `torch.set_float32_matmul_precision("medium")`, else in x's dtype. Layers that have
    hooks are called one after the other, so that the hooks run.
    """
    if not (_plain(up) and _plain(down)):
        return down(activate(up(x), activation))
    assert isinstance(up, SparseLinear) and isinstance(down, SparseLinear)
    x = up.cast(x)
    medium = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    y, _ = torch.ops.rarefy.mlp(
        up.values,
        *up.index,
        down.values,
        *down.index,
        x.reshape(x.shape[:-1].numel(), x.shape[-1]),
        up.bias,
        down.bias,
        activation,
        torch.bfloat16 if medium else x.dtype,
        up.sink,
        down.sink,
    )
    return y.view(*x.shape[:-1], down.out_features)


def _plain(layer: nn.Module) -> bool:
    """Whether nothing but the layer's own arithmetic happens when it is called."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is SparseLinear and not any(hooks)
