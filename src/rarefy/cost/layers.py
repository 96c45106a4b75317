"""Layers to be timed, and what they are called with: linear ones, and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.cost.convolution import Convolution
from rarefy.cost.precision import Precision, activation_dtype
from rarefy.nn import SparseConv1d, SparseConv2d, SparseLayer, SparseLinear
from rarefy.pattern import Pattern

Dense = nn.Linear | nn.Conv1d | nn.Conv2d


def dense_layer(shape: tuple[int, int], bias: bool = True, conv: Convolution | None = None) -> Dense:
    """The dense layer whose weight is a matrix of a shape (out, in), drawn without touching torch's random state."""
    with torch.random.fork_rng(devices=[]):
        if conv is None:
            return nn.Linear(shape[1], shape[0], bias)
        layer = _dense_conv(shape[0], bias, conv)
        if conv.axes == 1 or not conv.channels_last:
            return layer
        return layer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _dense_conv(out_channels: int, bias: bool, conv: Convolution, device: str = "cpu") -> nn.Conv1d | nn.Conv2d:
    odd = any(zeros % 2 for zeros in conv.border)
    down, along = (zeros // 2 for zeros in conv.border)
    channels, more = (conv.images[1], out_channels), (conv.groups, bias)
    if conv.axes == 1:
        kernel, stride, dilation = conv.kernel[1], conv.stride[1], conv.dilation[1]
        return nn.Conv1d(*channels, kernel, stride, "same" if odd else along, dilation, *more, device=device)
    padding = "same" if odd else (down, along)
    return nn.Conv2d(*channels, conv.kernel, conv.stride, padding, conv.dilation, *more, device=device)


def sparse_layer(
    pattern: Pattern, generator: torch.Generator, bias: bool = True, conv: Convolution | None = None
) -> SparseLayer:
    """The layer of a pattern, its values drawn."""
    if conv is None:
        return SparseLinear.from_pattern(pattern, bias=bias, generator=generator)
    kind = SparseConv1d if conv.axes == 1 else SparseConv2d
    layer = kind.__new__(kind)
    layer._allocate(pattern.shape, pattern.block, pattern.num_units, bias, None, None)
    layer.take_geometry(_dense_conv(pattern.shape[0], bias, conv, "meta"))
    layer.set_pattern(pattern)
    layer.reset_parameters(generator)
    return layer


def random_batch(
    shape: tuple[int, int], tokens: int, generator: torch.Generator, conv: Convolution | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's input x, which wants a gradient, and dy, the gradient of its output: (tokens, in) and (tokens, out), or
    images as the convolution gets them.
    """
    if conv is None:
        x, dy = (torch.randn(tokens, features, generator=generator) for features in (shape[1], shape[0]))
        return x.requires_grad_(), dy
    sizes = conv.images, (conv.images[0], shape[0], *conv.size)
    layout = torch.channels_last if conv.channels_last else torch.contiguous_format
    x, dy = (torch.randn(size, generator=generator).contiguous(memory_format=layout) for size in sizes)
    if conv.axes == 1:
        x, dy = x.squeeze(2), dy.squeeze(2)
    return x.requires_grad_(), dy


def in_precision(x: Tensor, dy: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """The same batch, as a layer in this precision gets it; x wants a gradient."""
    dtype = activation_dtype(precision)
    return x.detach().to(dtype).requires_grad_(), dy.to(dtype)
