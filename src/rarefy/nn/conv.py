"""Convolutions that hold and train only the units of their pattern, along one axis or over two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from rarefy.init import magnitude_pattern
from rarefy.nn.layer import SparseLayer, gather_units
from rarefy.ops import operators
from rarefy.ops.geometry import Geometry
from rarefy.pattern import Block, Pattern, as_block, check_density, unit_grid

Sizes = tuple[int, ...]
"""One number an axis."""


class SparseConvolution(SparseLayer):
    """What the convolutions share: torch's with `values` at the units of their weight's matrix, whose shape is
    (out_channels, in_channels / groups * taps).

    Args:
        density, block, generator, device, dtype: as for `SparseLinear`, over that matrix; rows of a block may not be
            of two groups.
        the others: as for torch's; padding with zeros.
    Attributes:
        values, bias, pattern, density: as for `SparseLinear`.
    Raises:
        ValueError: groups, a kernel, stride or padding that cannot be, or anything `SparseLinear` refuses.

    With groups the kernels read a second index, of the matrix (out_channels, in_channels * taps), made at the first
    call after a rewire: O(nnz) time and memory more.
    """

    axes: ClassVar[int]
    """Of what it goes over."""
    dense_type: ClassVar[Callable[..., nn.Conv1d | nn.Conv2d]]
    """torch's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sizes,
        stride: int | Sizes = 1,
        padding: int | Sizes | str = 0,
        dilation: int | Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        density: float,
        block: Block = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse_unless_possible(type(self), padding_mode)
        check_groups(groups, in_channels, out_channels)
        check_group_blocks(groups, out_channels, as_block(block))
        kernel = _sizes("kernel_size", kernel_size, 1, self.axes)
        shape = (out_channels, in_channels // groups * math.prod(kernel))
        rows, cols = unit_grid(shape, as_block(block))
        num_units = min(max(1, round(check_density(density) * rows * cols)), rows * cols)
        self._allocate(shape, as_block(block), num_units, bias, device, dtype)
        self._set_geometry(kernel, stride, padding, dilation, groups)
        if self.values.device.type != "meta":
            self.reset_parameters(generator)

    def _set_geometry(
        self, kernel: Sizes, stride: int | Sizes, padding: int | Sizes | str, dilation: int | Sizes, groups: int
    ) -> None:
        self.kernel_size, self.stride = kernel, _sizes("stride", stride, 1, self.axes)
        self.dilation = _sizes("dilation", dilation, 1, self.axes)
        self.padding = _padding(padding, kernel, self.stride, self.dilation)
        self.groups = groups
        self.out_channels, self.in_channels = self.out_features, self.in_features // math.prod(kernel) * groups

    def take_geometry(self, conv: nn.Conv1d | nn.Conv2d) -> None:
        """That of a dense convolution.

        Raises:
            ValueError: it has padding that is not known here, groups that share a row of blocks, or other axes.
        """
        if len(conv.kernel_size) != self.axes:
            raise ValueError(
                f"{type(self).__name__} takes the place of nn.Conv{self.axes}d, not of {type(conv).__name__}"
            )
        _refuse_unless_possible(type(self), conv.padding_mode)
        check_group_blocks(conv.groups, conv.out_channels, self.block)
        self._set_geometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def geometry(self) -> Geometry:
        """As the kernels take it, over two axes: the first has one pixel where the layer has but one."""
        lead = 2 - self.axes
        given = ((self.kernel_size, 1), (self.stride, 1), (self.padding, 0), (self.dilation, 1))
        return Geometry(*([alone] * lead + list(sizes) for sizes, alone in given), groups=self.groups)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv1d | nn.Conv2d,
        *,
        density: float | None = None,
        pattern: Pattern | None = None,
        block: Block = 1,
    ) -> Self:
        """The layer whose values are the dense one's at the units of `pattern`, or at those of largest magnitude.

        Raises:
            ValueError: neither or both of density and pattern, a pattern of another shape, groups that share a row of
                blocks, or padding that is not in numbers and zeros.
        """
        weight = conv.weight.detach().flatten(1)
        if (density is None) == (pattern is None):
            raise ValueError("from_dense needs either density= or pattern=, and not both")
        if pattern is None:
            rows, cols = unit_grid(weight.shape, as_block(block))
            assert density is not None
            pattern = magnitude_pattern(weight, max(1, round(check_density(density) * rows * cols)), block)
        if pattern.shape != tuple(weight.shape):
            raise ValueError(
                f"the pattern is for a {pattern.shape} matrix, the layer's weight is one of {tuple(weight.shape)}"
            )
        layer = cls.__new__(cls)
        has_bias = conv.bias is not None
        layer._allocate(pattern.shape, pattern.block, pattern.num_units, has_bias, weight.device, weight.dtype)
        layer.take_geometry(conv)
        layer.set_pattern(pattern)
        with torch.no_grad():
            layer.values.copy_(gather_units(weight, pattern))
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        layer.train(conv.training)
        layer.values.requires_grad_(conv.weight.requires_grad)
        return layer

    def _convolve(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, h, w)."""
        return operators.conv2d(self.values, *self.index, self.cast(images), self.bias, *self.geometry, self.sink)

    def to_dense(self) -> nn.Conv1d | nn.Conv2d:
        """The dense convolution that computes the same, with its own memory."""
        weight = self.dense_weight().view(self.out_channels, -1, *self.kernel_size)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        has_bias = self.bias is not None
        conv = self.dense_type(
            self.in_channels, self.out_channels, *geometry, bias=has_bias, device="meta", dtype=weight.dtype
        )
        conv.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        block = "" if self.block == (1, 1) else f", block={self.block[0]}x{self.block[1]}"
        bias = "" if self.bias is not None else ", bias=False"
        how = "" if self.compute == "sparse" else ", computes dense"
        groups = "" if self.groups == 1 else f", groups={self.groups}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}{groups}, density={self.density:.4g}{block}{bias}{how}"
        )


class SparseConv2d(SparseConvolution):
    """torch.nn.Conv2d with `values` at the units of its weight's matrix (out_channels, in_channels / groups * kh * kw).

    Arguments, attributes and errors as for `SparseConvolution`.

    Forward and both gradients cost O(nnz * pixels), memory of parameter, gradient and index is O(nnz). Fastest with
    channels_last images in batches of at least 16 (32 in bf16), which the kernels keep side by side; y is channels_last
    where x is.
    At a rewire, growth by the exact gradient needs a dense weight gradient of the layer for that step.
    """

    axes = 2
    dense_type = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, h, w); also without N, as torch's."""
        return self._convolve(x[None])[0] if x.dim() == 3 else self._convolve(x)


class SparseConv1d(SparseConvolution):
    """torch.nn.Conv1d with `values` at the units of its weight's matrix (out_channels, in_channels / groups * k).

    It is `SparseConv2d` on images of one row, and costs what that costs. Fastest where a position's channels lie side
    by side in memory, as in `x.transpose(1, 2)` of an x (N, L, channels), and so do y's then; others are converted on
    the way, there and back.
    """

    axes = 1
    dense_type = nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, L) -> (N, out_channels, l); also without N, as torch's.

        Raises:
            ValueError: x has neither two nor three dimensions.
        """
        if x.dim() not in (2, 3):
            raise ValueError(
                f"SparseConv1d: x must be (batch, channels, length) or without batch, got {tuple(x.shape)}"
            )
        y = self._convolve((x[None] if x.dim() == 2 else x).unsqueeze(2)).squeeze(2)
        return y[0] if x.dim() == 2 else y


SPARSE_TYPES: dict[type[nn.Module], type[SparseConvolution]] = {nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d}
"""What takes the place of torch's."""


def check_convertible(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Raises ValueError for a dense convolution that cannot be sparse: it has padding that is not known."""
    kind = SparseConv1d if isinstance(conv, nn.Conv1d) else SparseConv2d
    _refuse_unless_possible(kind, conv.padding_mode)
    _padding(conv.padding, conv.kernel_size, conv.stride, conv.dilation)


def check_groups(groups: int, in_channels: int, out_channels: int) -> None:
    """Raises ValueError for channels that so many groups cannot share."""
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups must divide in_channels and out_channels, got {groups} groups of {in_channels} and {out_channels}"
        )


def check_group_blocks(groups: int, out_channels: int, block: tuple[int, int]) -> None:
    """Raises ValueError for blocks with rows of two groups."""
    if out_channels // groups % block[0]:
        raise ValueError(
            f"block {block[0]}x{block[1]} does not fit {groups} groups of {out_channels // groups} output channels: "
            f"its {block[0]} rows must divide them"
        )


def _refuse_unless_possible(kind: type[SparseConvolution], padding_mode: str) -> None:
    if padding_mode != "zeros":
        raise ValueError(f"{kind.__name__} pads with zeros only, got padding_mode={padding_mode!r}: leave it dense")


def _sizes(name: str, given: int | Sizes, least: int, axes: int) -> Sizes:
    """One an axis."""
    sizes = (given,) * axes if isinstance(given, int) else tuple(given)
    if len(sizes) != axes or any(not isinstance(n, int) or n < least for n in sizes):
        several = "" if axes == 1 else ", or two"
        raise ValueError(f"{name} must be an int of at least {least}{several}, got {given!r}")
    return sizes


def _padding(given: int | Sizes | str, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Sizes:
    """In numbers."""
    if not isinstance(given, str):
        return _sizes("padding", given, 0, len(kernel))
    both = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if given == "valid":
        return (0,) * len(kernel)
    if given != "same":
        raise ValueError(f'padding must be numbers, "same" or "valid", got {given!r}')
    if any(step != 1 for step in stride) or any(size % 2 for size in both):
        raise ValueError(
            f'padding="same" needs a stride of 1 and as much padding on either side, got stride {stride} and a kernel '
            f"of {kernel} with dilation {dilation}: leave it dense"
        )
    return tuple(size // 2 for size in both)
