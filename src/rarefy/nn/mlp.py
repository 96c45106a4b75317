"""Linear layers with an activation between them, computed as one where all are sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rarefy.nn.linear import SparseLinear
from rarefy.ops import operators
from rarefy.ops.mlp import activate


def mlp(x: Tensor, up: nn.Module, activation: str, down: nn.Module) -> Tensor:
    """down(act(up(x))): as one call of the kernels if both layers are SparseLinear, else one after the other.

    Args:
        x: (..., in_features).
        up, down: nn.Linear, SparseLinear or anything like them.
        activation: "gelu", "gelu_tanh", "silu", "relu" or "squared_relu".

    As one call, the hidden activations stay in cache, and of them only the activation's inputs are kept for the
    backward pass: in bf16 under autocast or `torch.set_float32_matmul_precision("medium")`, else in x's dtype. Layers
    that have hooks are called one after the other, so that the hooks run.
    """
    if not (is_plain(up) and is_plain(down)):
        return down(activate(up(x), activation))
    return _fused("mlp", x, [up, down], activation)


def gated_mlp(x: Tensor, gate: nn.Module, up: nn.Module, activation: str, down: nn.Module) -> Tensor:
    """down(act(gate(x)) * up(x)), the MLP of Llama and its kin: as `mlp`; kept are the outputs of gate and up."""
    if not (is_plain(gate) and is_plain(up) and is_plain(down)):
        return down(activate(gate(x), activation) * up(x))
    return _fused("gated_mlp", x, [gate, up, down], activation)


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a SparseLinear that computes sparse, and nothing else happens when it is called."""
    return type(layer) is SparseLinear and layer.compute == "sparse" and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, its own or those of all modules."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or bool(_has_any_global_hook())


@torch.compiler.assume_constant_result
def _is_medium() -> bool:
    """Whether matmuls may be less precise than fp32. A compiled graph keeps the answer that it was traced with."""
    return torch.get_float32_matmul_precision() == "medium"


def _fused(op: str, x: Tensor, modules: list[nn.Module], activation: str) -> Tensor:
    x = SparseLinear.cast(x)
    medium = x.dtype == torch.float32 and _is_medium()
    matrices, biases, sinks = [], [], []
    for layer in modules:
        assert isinstance(layer, SparseLinear)
        matrices += [layer.values, *layer.index]
        biases.append(layer.bias)
        sinks.append(layer.sink)
    y, _ = getattr(operators, op)(
        *matrices,
        x.reshape(x.shape[:-1].numel(), x.shape[-1]),
        *biases,
        activation,
        torch.bfloat16 if medium else x.dtype,
        *sinks,
    )
    return y.view(*x.shape[:-1], y.shape[-1])
