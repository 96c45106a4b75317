"""The convolutions of well-known networks, by the network's name: what `rarefy bench --convs resnet50` times."""

from __future__ import annotations

_NETWORKS = {
    # He et al. 2016, arXiv:1512.03385, with the 3x3 stem for images of 32x32.
    "resnet18": """
        64x64x3x32
        128x64x3x32/2 128x64x1x32/2 128x128x3x16
        256x128x3x16/2 256x128x1x16/2 256x256x3x8
        512x256x3x8/2 512x256x1x8/2 512x512x3x4
    """,
    # The same, images of 224x224, strides in the 3x3 convolutions.
    "resnet50": """
        64x64x1x56 64x64x3x56 256x64x1x56 64x256x1x56
        128x256x1x56 128x128x3x56/2 512x128x1x28 512x256x1x56/2 128x512x1x28 128x128x3x28
        256x512x1x28 256x256x3x28/2 1024x256x1x14 1024x512x1x28/2 256x1024x1x14 256x256x3x14
        512x1024x1x14 512x512x3x14/2 2048x512x1x7 2048x1024x1x14/2 512x2048x1x7 512x512x3x7
    """,
    # Zagoruyko and Komodakis 2016, arXiv:1605.07146, images of 32x32.
    "wrn22x2": """
        32x16x3x32 32x16x1x32 32x32x3x32
        64x32x3x32/2 64x32x1x32/2 64x64x3x16
        128x64x3x16/2 128x64x1x16/2 128x128x3x8
    """,
    # Xie et al. 2017, arXiv:1611.05431: 32 groups of 4 channels and more (32x4d), images of 224x224.
    "resnext50": """
        128x64x1x56 128x128x3x56g32 256x128x1x56 256x64x1x56 128x256x1x56
        256x256x1x56 256x256x3x56/2g32 512x256x1x28 512x256x1x56/2 256x512x1x28 256x256x3x28g32
        512x512x1x28 512x512x3x28/2g32 1024x512x1x14 1024x512x1x28/2 512x1024x1x14 512x512x3x14g32
        1024x1024x1x14 1024x1024x3x14/2g32 2048x1024x1x7 2048x1024x1x14/2 1024x2048x1x7 1024x1024x3x7g32
    """,
    # Howard et al. 2017, arXiv:1704.04861, images of 224x224; its depthwise convolutions stay dense.
    "mobilenet": """
        64x32x1x112 128x64x1x56 128x128x1x56 256x128x1x28 256x256x1x28
        512x256x1x14 512x512x1x14 1024x512x1x7 1024x1024x1x7
    """,
}

CONVS = {name: tuple(convs.split()) for name, convs in _NETWORKS.items()}
"""Name -> its convolutions, each shape once and in order, as `--convs` writes them. Without the first one, which reads
three channels and stays dense."""
