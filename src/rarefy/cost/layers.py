"""Layers to be timed, and what they are called with: linear ones, and convolutions on channels_last images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.cost.convolution import Convolution
from rarefy.cost.precision import Precision, activation_dtype
from rarefy.nn import SparseConv2d, SparseLayer, SparseLinear
from rarefy.pattern import Pattern


def dense_layer(shape: tuple[int, int], bias: bool = True, conv: Convolution | None = None) -> nn.Linear | nn.Conv2d:
    """The dense layer whose weight is a matrix of a shape (out, in), drawn without touching torch's random state."""
    with torch.random.fork_rng(devices=[]):
        if conv is None:
            return nn.Linear(shape[1], shape[0], bias)
        made = nn.Conv2d(conv.images[1], shape[0], *conv.dense_kernel, groups=conv.groups, bias=bias)
        return made.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def sparse_layer(
    pattern: Pattern, generator: torch.Generator, bias: bool = True, conv: Convolution | None = None
) -> SparseLayer:
    """The layer of a pattern, its values drawn."""
    if conv is None:
        return SparseLinear.from_pattern(pattern, bias=bias, generator=generator)
    dense = nn.Conv2d(conv.images[1], pattern.shape[0], *conv.dense_kernel, bias=bias, device="meta")
    layer = SparseConv2d.__new__(SparseConv2d)
    layer._allocate(pattern.shape, pattern.block, pattern.num_units, bias, None, None)
    layer.take_geometry(dense)
    layer.set_pattern(pattern)
    layer.reset_parameters(generator)
    return layer


def random_batch(
    shape: tuple[int, int], tokens: int, generator: torch.Generator, conv: Convolution | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's input x, which wants a gradient, and dy, the gradient of its output: (tokens, in) and (tokens, out), or
    images.
    """
    x_shape, dy_shape = (tokens, shape[1]), (tokens, shape[0])
    if conv is not None:
        x_shape, dy_shape = conv.images, (conv.images[0], shape[0], *conv.size)
    x, dy = (torch.randn(size, generator=generator) for size in (x_shape, dy_shape))
    if conv is not None:
        x, dy = (images.contiguous(memory_format=torch.channels_last) for images in (x, dy))
    return x.requires_grad_(), dy


def in_precision(x: Tensor, dy: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """The same batch, as a layer in this precision gets it; x wants a gradient."""
    dtype = activation_dtype(precision)
    return x.detach().to(dtype).requires_grad_(), dy.to(dtype)
