"""The layers that are timed: those that the model is fitted on, and others that it is checked on."""

from __future__ import annotations

from typing import NamedTuple

from rarefy.cost.convolution import Convolution


class Point(NamedTuple):
    """A layer and what it is called with."""

    shape: tuple[int, int]
    """(out, in) of its matrix."""
    density: float
    """Share of the units that exist, where it is sparse."""
    tokens: int
    """Rows of input, or pixels of a convolution's output over all images."""
    conv: Convolution | None = None


def convolution(
    images: int, channels: int, side: int, out: int, density: float, *, kernel: int = 3, stride: int = 1
) -> Point:
    """On square images, whose size it keeps but for the stride."""
    border = 2 * (kernel // 2)
    conv = Convolution((images, channels, side, side), (kernel, kernel), (stride, stride), (border, border))
    return Point(conv.matrix(out), density, conv.pixels, conv)


CALIBRATED: tuple[Point, ...] = (
    Point((1024, 1024), 0.1, 2048),
    convolution(32, 64, 16, 64, 0.1),
    Point((256, 256), 0.1, 256),
    convolution(32, 32, 32, 32, 0.2),
    Point((512, 2048), 0.05, 2048),
    convolution(64, 128, 8, 128, 0.1),
    Point((2048, 512), 0.05, 2048),
    convolution(32, 64, 16, 128, 0.1, stride=2),
    Point((512, 512), 0.3, 1024),
    convolution(32, 256, 4, 256, 0.1),
    Point((1024, 1024), 0.02, 512),
    convolution(64, 128, 16, 128, 0.1, kernel=1),
    Point((4096, 1024), 0.1, 2048),
    convolution(16, 64, 28, 64, 0.1),
    Point((1024, 4096), 0.1, 2048),
    convolution(32, 128, 56, 256, 0.1, kernel=1, stride=2),
    Point((256, 1024), 0.1, 128),
    convolution(64, 256, 8, 128, 0.05),
    Point((1024, 512), 0.1, 256),
    convolution(32, 128, 8, 256, 0.1, stride=2),
    Point((768, 3072), 0.2, 1024),
    convolution(64, 32, 16, 64, 0.3),
    Point((512, 512), 0.1, 4096),
    convolution(16, 32, 56, 32, 0.1),
    Point((1536, 512), 0.5, 512),
    convolution(32, 512, 4, 256, 0.05),
    Point((768, 768), 0.05, 512),
    convolution(128, 64, 32, 64, 0.1, kernel=1),
    Point((1024, 256), 0.02, 2048),
    convolution(64, 256, 4, 256, 0.1, stride=2),
    Point((3072, 768), 0.2, 1024),
    convolution(128, 64, 8, 64, 0.02),
    Point((2048, 2048), 0.1, 256),
    convolution(32, 256, 14, 512, 0.2, kernel=1, stride=2),
    Point((1792, 768), 0.15, 640),
    convolution(32, 256, 14, 64, 0.1, kernel=1),
    Point((2048, 2048), 0.02, 1024),
    convolution(32, 64, 28, 256, 0.1, kernel=1),
    Point((640, 512), 0.2, 320),
    convolution(32, 512, 7, 512, 0.1, kernel=1),
)
"""The most telling first, linear layers and convolutions in turn: small and large, wide and tall, thin and full, few
tokens and many, images of many pixels and of few, strides, and one tap."""

LEAST_POINTS = 26
"""Timed whatever the time: of each structure no more terms than points."""

HELD_OUT: tuple[Point, ...] = (
    Point((1152, 384), 0.1, 2048),
    Point((384, 1536), 0.07, 1536),
    Point((640, 640), 0.15, 3072),
    Point((2560, 640), 0.1, 1024),
    Point((896, 896), 0.04, 384),
    Point((1280, 1280), 0.25, 768),
    Point((1536, 3072), 0.08, 1536),
    # ResNet-18 on 32x32 pixels
    convolution(64, 64, 32, 64, 0.1),
    convolution(64, 128, 16, 128, 0.1),
    convolution(64, 64, 32, 128, 0.1, stride=2),
    convolution(64, 256, 8, 256, 0.05),
    convolution(64, 512, 4, 512, 0.1),
    # WRN-22-2
    convolution(128, 32, 32, 32, 0.2),
    convolution(128, 64, 16, 64, 0.2),
    convolution(128, 64, 16, 128, 0.1, stride=2),
    convolution(128, 128, 8, 128, 0.05),
    # ResNet-50
    convolution(32, 64, 56, 64, 0.1),
    convolution(32, 256, 56, 64, 0.1, kernel=1),
    convolution(32, 128, 28, 512, 0.1, kernel=1),
    convolution(32, 256, 14, 256, 0.1),
    convolution(32, 256, 56, 512, 0.1, kernel=1, stride=2),
    # MobileNet's points
    convolution(16, 32, 112, 64, 0.2, kernel=1),
    convolution(32, 512, 14, 512, 0.1, kernel=1),
    convolution(32, 1024, 7, 1024, 0.1, kernel=1),
)
"""None of them in `CALIBRATED`: other linear layers, and convolutions of networks that people train."""
