"""A 2-d convolution that holds and trains only the units of its pattern."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from rarefy.init import magnitude_pattern
from rarefy.nn.layer import SparseLayer, gather_units
from rarefy.pattern import Block, Pattern, as_block, check_density, unit_grid

Pair = int | tuple[int, int]


class SparseConv2d(SparseLayer):
    """torch.nn.Conv2d with `values` at the units of its weight's matrix (out_channels, in_channels * kh * kw).

    Args:
        density, block, generator, device, dtype: as for `SparseLinear`, over that matrix.
        the others: as for torch.nn.Conv2d; padding with zeros. groups must be 1.
    Attributes:
        values, bias, pattern, density: as for `SparseLinear`.
    Raises:
        ValueError: groups, a kernel, stride or padding that cannot be, or anything `SparseLinear` refuses.

    Forward and both gradients cost O(nnz * pixels), memory of parameter, gradient and index is O(nnz). Fastest with
    channels_last images in batches of at least 16 (32 in bf16), which the kernels keep side by side; y is channels_last
    where x is.
    At a rewire, growth by the exact gradient needs a dense weight gradient of the layer for that step.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
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
        refuse_unless_possible(groups, padding_mode)
        kernel = _pair("kernel_size", kernel_size, 1)
        shape = (out_channels, in_channels * kernel[0] * kernel[1])
        rows, cols = unit_grid(shape, as_block(block))
        num_units = min(max(1, round(check_density(density) * rows * cols)), rows * cols)
        self._allocate(shape, as_block(block), num_units, bias, device, dtype)
        self._set_geometry(kernel, stride, padding, dilation)
        if self.values.device.type != "meta":
            self.reset_parameters(generator)

    def _set_geometry(self, kernel: tuple[int, int], stride: Pair, padding: Pair | str, dilation: Pair) -> None:
        self.kernel_size, self.stride = kernel, _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        self.padding = _padding(padding, kernel, self.stride, self.dilation)
        self.out_channels, self.in_channels = self.out_features, self.in_features // (kernel[0] * kernel[1])

    def take_geometry(self, conv: nn.Conv2d) -> None:
        """That of a dense convolution.

        Raises:
            ValueError: as `geometry_of`.
        """
        self._set_geometry(*geometry_of(conv))

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, density: float | None = None, pattern: Pattern | None = None, block: Block = 1
    ) -> Self:
        """The layer whose values are the dense one's at the units of `pattern`, or at those of largest magnitude.

        Raises:
            ValueError: neither or both of density and pattern, a pattern of another shape, groups, or padding that is
                not in numbers and zeros.
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

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, h, w); also without N, as torch's."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        return torch.ops.rarefy.conv2d(self.values, *self.index, self.cast(x), self.bias, *geometry, self.sink)

    def to_dense(self) -> nn.Conv2d:
        """The nn.Conv2d that computes the same, with its own memory."""
        weight = self.dense_weight().view(self.out_channels, self.in_channels, *self.kernel_size)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        has_bias = self.bias is not None
        conv = nn.Conv2d(
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
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, density={self.density:.4g}{block}{bias}{how}"
        )


def geometry_of(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride, padding and dilation of a dense convolution that can be sparse.

    Raises:
        ValueError: it has groups, or padding that SparseConv2d does not know.
    """
    refuse_unless_possible(conv.groups, conv.padding_mode)
    kernel, stride, dilation = (_two(pair) for pair in (conv.kernel_size, conv.stride, conv.dilation))
    padding = conv.padding if isinstance(conv.padding, str) else _two(conv.padding)
    return kernel, stride, _padding(padding, kernel, stride, dilation), dilation


def refuse_unless_possible(groups: int, padding_mode: str) -> None:
    """Raises ValueError for a convolution that cannot be sparse."""
    if groups != 1:
        raise ValueError(f"SparseConv2d has no groups, got groups={groups}: leave this convolution dense")
    if padding_mode != "zeros":
        raise ValueError(f"SparseConv2d pads with zeros only, got padding_mode={padding_mode!r}: leave it dense")


def _two(pair: tuple[int, ...]) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])


def _pair(name: str, given: Pair, least: int) -> tuple[int, int]:
    pair = (given, given) if isinstance(given, int) else tuple(given)
    if len(pair) != 2 or any(not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"{name} must be an int of at least {least}, or two, got {given!r}")
    return pair[0], pair[1]


def _padding(
    given: Pair | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """In numbers."""
    if not isinstance(given, str):
        return _pair("padding", given, 0)
    both = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if given == "valid":
        return 0, 0
    if given != "same":
        raise ValueError(f'padding must be numbers, "same" or "valid", got {given!r}')
    if stride != (1, 1) or any(size % 2 for size in both):
        raise ValueError(
            f'padding="same" needs a stride of 1 and as much padding on either side, got stride {stride} and a kernel '
            f"of {kernel} with dilation {dilation}: leave it dense"
        )
    return both[0] // 2, both[1] // 2
