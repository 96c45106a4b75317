"""Pixels as a PNG image inside a page."""

from __future__ import annotations

import base64
import struct
import zlib

COLOUR_TYPE = {1: 0, 3: 2}
"""Channels -> what PNG calls it: grey, RGB."""


def data_uri(pixels: bytes, shape: tuple[int, int, int]) -> str:
    """A data: URI of an image.

    Args:
        pixels: planes one after the other, (C, H, W) row-major, a byte each.
        shape: C (1 or 3), H, W.
    """
    channels, height, width = shape
    plane = height * width
    assert len(pixels) == channels * plane and channels in COLOUR_TYPE
    mixed = bytearray(len(pixels))
    for channel in range(channels):
        mixed[channel::channels] = pixels[channel * plane : (channel + 1) * plane]
    row = width * channels
    filtered = b"".join(b"\0" + mixed[at : at + row] for at in range(0, len(mixed), row))  # 0: each row as it is
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPE[channels], 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(filtered, 9)), _chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
