"""The linear layers and convolutions that a model has, and why some of them must stay dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rarefy.nn import SparseConvolution, SparseLayer, SparseLowRank
from rarefy.nn.conv import check_convertible


@dataclass(frozen=True)
class Layer:
    """A layer that could be sparse, or whose reason not to be is worth listing."""

    name: str
    module: nn.Module
    shape: tuple[int, int]
    """(out_features, in_features) of the weight's matrix; a convolution's is (out, in / groups * taps)."""
    bias: bool
    why_dense: str
    """Why it cannot be converted; empty: it can."""
    adopted: bool = False
    """It is sparse already."""
    kernel: tuple[int, ...] | None = None
    """Of a convolution."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Of the dense weight: (out, in), or (out, in / groups, *kernel)."""
        return dims(self.shape, self.kernel)

    @property
    def groups(self) -> int:
        """Of a convolution's channels."""
        return int(getattr(self.module, "groups", 1)) if self.kernel is not None else 1

    @property
    def sparse(self) -> SparseLayer | None:
        """What holds its units, if it is sparse already."""
        module = self.module.sparse if isinstance(self.module, SparseLowRank) else self.module
        return module if isinstance(module, SparseLayer) else None

    @property
    def rank(self) -> int:
        """Of the low-rank part that it has already."""
        return self.module.rank if isinstance(self.module, SparseLowRank) else 0


def dims(shape: tuple[int, int], kernel: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of a dense weight whose matrix has this shape."""
    return shape if kernel is None else (shape[0], shape[1] // math.prod(kernel), *kernel)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D: a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer and convolution of the model by its first name, in order, with the reason why it must stay
    dense, if any.
    """
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    layers = {}
    for name, module in modules.items():
        if isinstance(modules.get(name.rpartition(".")[0]), SparseLowRank) and name:
            continue  # part of the layer above it
        if isinstance(module, SparseLayer | SparseLowRank):
            shape = (module.out_features, module.in_features)
            kernel = module.kernel_size if isinstance(module, SparseConvolution) else None
            layers[name] = Layer(name, module, shape, module.bias is not None, "", adopted=True, kernel=kernel)
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            parent = modules[name.rpartition(".")[0]] if name else None
            why = _why_not_convertible(name, module, parent, owners)
            layers[name] = Layer(name, module, _shape(module), getattr(module, "bias", None) is not None, why)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            parent = modules[name.rpartition(".")[0]] if name else None
            why = _why_not_convertible(name, module, parent, owners) or _why_not_conv(module)
            kernel = module.kernel_size
            layers[name] = Layer(name, module, _conv_shape(module), module.bias is not None, why, kernel=kernel)
        elif isinstance(module, nn.MultiheadAttention):
            inner = f"{name}.in_proj".lstrip(".")
            shape = (3 * module.embed_dim, module.embed_dim)
            layers[inner] = Layer(inner, module, shape, True, _READS_WEIGHTS.format("nn.MultiheadAttention"))
    return layers


_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What is known to compute what its class says."""

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


FEW_CHANNELS = 3
"""Inputs of a convolution that stays dense: the first layer of a network for images has so few weights that nothing is
saved, and published results keep it dense (Evci et al. 2020, arXiv:1911.11134, section 4)."""


FEW_INPUTS = 16
"""Inputs that an output of a depthwise convolution must read to be worth making sparse: at a density of 10% those of
3x3 places take 0.9 to 1.4 times as long as dense ones, of 5x5 and 7x7 0.3 to 0.7 times (docs/log.md, 2026-11-29)."""


def _conv_shape(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, int]:
    weight = conv.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return 0, 0
    return weight.shape[0], weight[0].numel() if weight.shape[0] else 0


def _why_not_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    if isinstance(conv, nn.Conv3d):
        return "it goes over three axes, and the kernels over two: nn.Conv1d and nn.Conv2d can be sparse"
    inputs = math.prod(conv.kernel_size)
    if conv.groups > 1 and conv.groups == conv.in_channels and inputs < FEW_INPUTS:
        return f"it has {conv.groups} groups (depthwise): each output reads few inputs already, {inputs}"
    if conv.in_channels <= FEW_CHANNELS:
        return f"it has {conv.in_channels} input channels: a first convolution is small, and best dense"
    try:
        check_convertible(conv)
    except ValueError as error:
        return str(error)
    return ""


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
    if type(module) not in _PLAIN and not is_conv1d(module):
        base = next((kind.__name__ for kind in _PLAIN if isinstance(module, kind)), "Linear")
        return f"{type(module).__name__} is a subclass of nn.{base} that may compute something else"
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
