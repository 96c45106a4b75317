"""A residual network of basic blocks (He et al. 2016, arXiv:1512.03385), with a 3x3 stem for small images.

Layer names, for the globs of a plan: stem, stages.S.B.{conv1,conv2,skip}, head. Shape letters as in
`rarefy.models.wrn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy.models.images import check_sizes, draw_he, every, image_batch, per_stage, skip_strides
from rarefy.nn import norm_relu, norm_relu_conv


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """The shape of a ResNet; the default is ResNet-18."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Of each stage; every stage but the first halves height and width."""

    width: int | tuple[int, ...] = 64
    """Channels of the first stage, and each next stage has twice as many; several numbers: channels of each stage."""

    channels: int = 3
    """Of an image."""

    classes: int = 10
    """K."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        check_sizes(channels=self.channels, classes=self.classes, stages=len(self.blocks))
        check_sizes(**{f"blocks of stage {at}": count for at, count in enumerate(self.blocks)})
        check_sizes(**{f"width of stage {at}": channels for at, channels in enumerate(self.stage_channels())})

    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage. Raises ValueError if `width` has not as many numbers as there are stages."""
        given = per_stage(self.width, len(self.blocks))
        if isinstance(self.width, Sequence):
            return given
        return tuple(first * (1 << at) for at, first in enumerate(given))


class BasicBlock(nn.Module):
    """3x3, norm, ReLU, 3x3, norm, added to the skip, ReLU; the skip is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.skip_step, skip_stride = skip_strides(inputs, stride)
        self.skip = nn.Conv2d(inputs, outputs, 1, skip_stride, bias=False) if changes else None
        self.skip_norm = nn.BatchNorm2d(outputs) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = norm_relu_conv(self.norm1, self.conv2, self.conv1(x))
        if self.skip is not None and self.skip_norm is not None:
            x = self.skip_norm(self.skip(every(self.skip_step, x)))
        return norm_relu(self.norm2, y, x)


class ResNet(nn.Module):
    """Images to the logits of their classes.

    Args:
        config: the shape.
        generator: draws the first weights; None: torch's global one.
    """

    def __init__(self, config: ResNetConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        channels = config.stage_channels()
        self.stem = nn.Conv2d(config.channels, channels[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels[0])
        inputs, stages = channels[0], []
        for at, (count, outputs) in enumerate(zip(config.blocks, channels, strict=True)):
            blocks = []
            for block in range(count):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if at and not block else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, config.classes)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as in He et al. 2015. Made for the dense model: `sparsify` rescales."""
        draw_he(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W) of one channel -> (B, K) logits."""
        x_BCHW = self.stages(norm_relu(self.stem_norm, self.stem(image_batch(x))))
        return self.head(x_BCHW.mean(dim=(2, 3)))
