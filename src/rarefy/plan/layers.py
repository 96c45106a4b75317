"""The linear layers that a model has, and why some of them must stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rarefy.nn import SparseLinear, SparseLowRank


@dataclass(frozen=True)
class Layer:
    """A layer that could be sparse, or whose reason not to be is worth listing."""

    name: str
    module: nn.Module
    shape: tuple[int, int]
    """(out_features, in_features)."""
    bias: bool
    why_dense: str
    """Why it cannot be converted; empty: it can."""
    adopted: bool = False
    """It is sparse already."""

    @property
    def sparse(self) -> SparseLinear | None:
        """What holds its units, if it is sparse already."""
        module = self.module.sparse if isinstance(self.module, SparseLowRank) else self.module
        return module if isinstance(module, SparseLinear) else None

    @property
    def rank(self) -> int:
        """Of the low-rank part that it has already."""
        return self.module.rank if isinstance(self.module, SparseLowRank) else 0


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D: a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer of the model by its first name, in order, with the reason why it must stay dense, if any."""
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    layers = {}
    for name, module in modules.items():
        if isinstance(modules.get(name.rpartition(".")[0]), SparseLowRank) and name:
            continue  # part of the layer above it
        if isinstance(module, SparseLinear | SparseLowRank):
            shape = (module.out_features, module.in_features)
            layers[name] = Layer(name, module, shape, module.bias is not None, "", adopted=True)
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            parent = modules[name.rpartition(".")[0]] if name else None
            why = _why_not_convertible(name, module, parent, owners)
            layers[name] = Layer(name, module, _shape(module), getattr(module, "bias", None) is not None, why)
        elif isinstance(module, nn.MultiheadAttention):
            inner = f"{name}.in_proj".lstrip(".")
            shape = (3 * module.embed_dim, module.embed_dim)
            layers[inner] = Layer(inner, module, shape, True, _READS_WEIGHTS.format("nn.MultiheadAttention"))
    return layers


_READS_WEIGHTS = "{} reads its weights itself, without calling a layer"


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features); (0, 0) for a weight that is not a matrix, or not there yet."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or isinstance(weight, nn.parameter.UninitializedParameter):
        return 0, 0
    if weight.dim() != 2:
        return 0, 0
    rows, cols = weight.shape
    return (cols, rows) if is_conv1d(module) else (rows, cols)


def _why_not_convertible(
    name: str, module: nn.Module, parent: nn.Module | None, owners: Mapping[int, list[str]]
) -> str:
    weight = getattr(module, "weight", None)
    if parent is None:
        return "it is the model itself: put it into a module, as it is replaced in its parent"
    if isinstance(parent, nn.MultiheadAttention):
        return _READS_WEIGHTS.format("nn.MultiheadAttention")
    if isinstance(parent, nn.TransformerEncoderLayer):
        return _READS_WEIGHTS.format("nn.TransformerEncoderLayer's fused path")
    if hasattr(module, "parametrizations"):
        return "its weight is computed by a parametrization"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"{type(module).__name__} is a subclass of nn.Linear that may compute something else"
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not an initialised parameter"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    others = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if others:
        return f"its weight is tied to {others[0]}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which a replacement would lose"
    return ""
