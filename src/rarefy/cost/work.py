"""What a prediction is asked for: one layer's task, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rarefy.cost.convolution import Convolution
from rarefy.cost.precision import Precision

Pass = Literal["forward", "step"]
"""forward: the forward pass alone. step: with the gradients of input, weights and bias."""

PASSES: tuple[Pass, ...] = ("forward", "step")


@dataclass(frozen=True)
class Work:
    """One layer's task."""

    shape: tuple[int, int]
    """(out_features, in_features); of a convolution the matrix that its weight is, (out, in * kh * kw)."""
    tokens: int
    """Rows of input; of a convolution pixels of the output, over all images."""
    nnz: int
    """Weights that exist."""
    block: tuple[int, int] | None
    """Unit shape; None: a dense layer."""
    precision: Precision = "fp32"
    conv: Convolution | None = None
    """None: a linear layer."""

    @property
    def name(self) -> str:
        """The layer in words."""
        if self.conv is None:
            return f"{self.shape[0]}x{self.shape[1]}"
        (images, channels, height, width), (kernel_height, kernel_width) = self.conv.images, self.conv.kernel
        stride = "" if self.conv.stride == (1, 1) else f", stride {self.conv.stride[0]}"
        weight = f"{self.shape[0]}x{channels}x{kernel_height}x{kernel_width}"
        return f"conv {weight} at {height}x{width}{stride}, {images} images"

    @property
    def convolves(self) -> bool:
        """Whether it is computed as a convolution: a sparse one with one tap on every pixel is a linear layer."""
        linear = self.conv is not None and self.conv.is_product and self.conv.groups == 1
        return self.conv is not None and not (linear and self.block is not None)

    @property
    def kind(self) -> str:
        """What shares its coefficients: the precision and the structure."""
        family = ""
        if self.convolves:
            assert self.conv is not None
            family = "grouped conv " if self.conv.groups > 1 else "conv "
        return f"{self.precision} {family}{self.structure}"

    @property
    def structure(self) -> str:
        """Its unit shape, or "dense"."""
        return "dense" if self.block is None else f"{self.block[0]}x{self.block[1]}"


def dense_work(
    shape: tuple[int, int], tokens: int, precision: Precision = "fp32", conv: Convolution | None = None
) -> Work:
    """The dense layer of a shape."""
    return Work(shape, tokens, shape[0] * shape[1], None, precision, conv)
