"""How a convolution's kernel meets its images."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """Pairs (height, width), and groups, as torch.nn.Conv2d has them."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int = 1

    @property
    def pairs(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """All but the groups."""
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def taps(self) -> int:
        """Inputs of each of its group's channels that an output reads."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_product(self) -> bool:
        """Whether every output pixel is a product of its own with one input pixel."""
        return [*self.kernel, *self.stride, *self.padding] == [1, 1, 1, 1, 0, 0]

    def out_size(self, size: int, axis: int) -> int:
        """Output pixels along an axis of `size` input pixels; below 1 where the kernel does not fit."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1
