"""A wide residual network for small images (Zagoruyko & Komodakis 2016, arXiv:1605.07146), without dropout.

Layer names, for the globs of a plan: stem, groups.G.B.{conv1,conv2,skip}, head. Shape letters: B images, C channels,
H W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy.models.images import check_sizes, draw_he, every, image_batch, per_stage, skip_strides
from rarefy.nn import norm_relu, norm_relu_conv


@dataclass(frozen=True, kw_only=True)
class WRNConfig:
    """The shape of a WRN-depth-width."""

    depth: int = 22
    """Layers with weights: 6 n + 4 for n blocks in each of three groups."""

    width: float | tuple[float, ...] = 2
    """Times 16, 32 and 64 channels, those of the three groups; three numbers: each its own. What a later group costs
    besides its products is little, as it has a quarter of the pixels of the one before: that is where to be wide and
    sparse."""

    channels: int = 3
    """Of an image."""

    classes: int = 10
    """K."""

    def __post_init__(self) -> None:
        check_sizes(channels=self.channels, classes=self.classes)
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 for n blocks a group, such as 10, 16, 22 or 28, got {self.depth}")
        per_stage(self.width, stages=3)  # raises

    def group_channels(self) -> tuple[int, int, int]:
        """Channels of each group."""
        widths = zip((16, 32, 64), per_stage(self.width, stages=3), strict=True)
        first, second, third = (max(1, round(channels * width)) for channels, width in widths)
        return first, second, third


class WideBlock(nn.Module):
    """norm, ReLU, 3x3, norm, ReLU, 3x3, beside a skip that is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.skip_step, skip_stride = skip_strides(inputs, stride)
        self.skip = nn.Conv2d(inputs, outputs, 1, skip_stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / stride, W / stride)."""
        if self.skip is None:
            y = norm_relu_conv(self.norm1, self.conv1, x)
        else:
            shared = norm_relu(self.norm1, x)
            x, y = self.skip(every(self.skip_step, shared)), self.conv1(shared)
        return x + norm_relu_conv(self.norm2, self.conv2, y)


class WRN(nn.Module):
    """Images to the logits of their classes.

    Args:
        config: the shape.
        generator: draws the first weights; None: torch's global one.
    """

    def __init__(self, config: WRNConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.channels, 16, 3, padding=1, bias=False)
        inputs, groups = 16, []
        for at, outputs in enumerate(config.group_channels()):
            blocks = []
            for block in range((config.depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, stride=2 if at and not block else 1))
                inputs = outputs
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, config.classes)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as in He et al. 2015. Made for the dense model: `sparsify` rescales."""
        draw_he(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W) of one channel -> (B, K) logits."""
        x_BCHW = self.groups(self.stem(image_batch(x)))
        return self.head(norm_relu(self.norm, x_BCHW).mean(dim=(2, 3)))
