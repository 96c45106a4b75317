"""A convolution as it is called: images, and how its kernel meets them. Numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import nn

from rarefy.nn import SparseConvolution

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """All but its weight. Pairs are (height, width)."""

    images: tuple[int, int, int, int]
    """(N, C, H, W) of its input."""
    kernel: Pair
    stride: Pair = (1, 1)
    border: Pair = (0, 0)
    """Zeros around the images, those of both sides together."""
    dilation: Pair = (1, 1)
    groups: int = 1
    axes: int = 2
    """1: it goes along one axis, and images have one row."""
    channels_last: bool = True
    """Whether a pixel's channels lie side by side in memory, as the kernels want them."""

    @classmethod
    def of(
        cls, conv: nn.Conv1d | nn.Conv2d | SparseConvolution, images: Sequence[int], channels_last: bool = True
    ) -> Self:
        """A layer's, on images (N, C, H, W), along one axis (N, C, L), or without N."""
        axes = len(conv.kernel_size)
        count, channels, *sizes = images if len(images) == 2 + axes else (1, *images)
        if conv.padding == "same":
            border = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        else:
            border = (0,) * axes if isinstance(conv.padding, str) else tuple(2 * zeros for zeros in conv.padding)
        return cls(
            images=(count, channels, *_pair(sizes, 1)),
            kernel=_pair(conv.kernel_size, 1),
            stride=_pair(conv.stride, 1),
            border=_pair(border, 0),
            dilation=_pair(conv.dilation, 1),
            groups=conv.groups,
            axes=axes,
            channels_last=channels_last,
        )

    @property
    def size(self) -> Pair:
        """(h, w) of its output; 0 where the kernel does not fit."""
        return self._out(0), self._out(1)

    def _out(self, axis: int) -> int:
        room = self.images[2 + axis] + self.border[axis] - self.reach[axis]
        return max(0, room // self.stride[axis] + 1)

    @property
    def reach(self) -> Pair:
        """Pixels of the input from the first tap to the last."""
        return (self.kernel[0] - 1) * self.dilation[0] + 1, (self.kernel[1] - 1) * self.dilation[1] + 1

    @property
    def taps(self) -> int:
        """Inputs of each channel that an output reads."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of its output, over all images: what rows of input are to a linear layer."""
        return self.images[0] * self.size[0] * self.size[1]

    @property
    def is_product(self) -> bool:
        """Whether the sparse layer runs as a linear one on its pixels (`rarefy.ops.geometry`)."""
        return self.taps == 1 and self.stride == (1, 1) and self.border == (0, 0)

    def matrix(self, out_channels: int) -> Pair:
        """Shape of the matrix that its weight is."""
        return out_channels, self.images[1] // self.groups * self.taps


def _pair(given: Sequence[int], alone: int) -> Pair:
    """Of one number the second: along one axis images have one row."""
    return (alone, int(given[0])) if len(given) == 1 else (int(given[0]), int(given[1]))
