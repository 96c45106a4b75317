"""The physical terms of a convolution: what csrc/drive_conv.h does, and what oneDNN's dense one does.

N images of C channels and H x W pixels, O channels and h x w pixels out, k taps; the matrix is O x Ck. For the kernels
N counts whole groups of images, as many as threads can share, and w whole panels (rarefy.cost.batching).
"""

from __future__ import annotations

from rarefy.cost.batching import Batching
from rarefy.cost.convolution import Convolution
from rarefy.cost.precision import activation_dtype
from rarefy.cost.work import Pass, Work

ROWS = 2
"""Rows of the output that share what is cut out of a band of the input."""

MOST_PARTS = 16
"""Sums of the values' gradient that exist side by side, at most."""

FRESH_BYTES = 32 << 20
"""Dense tensors of this size and more are mapped anew at every call: glibc keeps nothing as large."""


def sparse_conv_terms(work: Work, which: Pass, l2_bytes: int, batching: Batching) -> dict[str, float]:
    """Name -> amount, for units of any shape."""
    assert work.conv is not None and work.block is not None
    conv, out = work.conv, work.shape[0]
    count, channels, height, width = conv.images
    images, pixels = batching.whole(count, work.precision), batching.panel(count, work.precision)
    place_bytes = 4 * batching.lanes  # of a pixel of the images side by side: float32, or twice as many in bfloat16
    by_column = work.block[1] > 1  # a panel then holds an input for each column of the matrix

    ahead = images * conv.size[0] * _whole(conv.size[1], pixels)
    packed = images * channels * height * width
    band = channels * _band_places(conv, pixels) * place_bytes
    far_packed = packed * _outside(band, l2_bytes)
    cut = channels * ahead * (conv.taps if by_column else _share(conv, conv.stride, conv.size[0], pixels))
    products, places, scattered, parts = work.nnz * ahead, 0, 0, 0
    if which == "step":
        parts = min(MOST_PARTS, -(-count // batching.side_by_side(count, work.precision)))
        if _turns(work, batching):
            back = images * height * _whole(width, pixels)
            far_packed += out * ahead * _outside(band * out // channels, l2_bytes)
            cut += out * back * _share(conv, (1, 1), height, pixels)
        else:  # x's band and its gradient's, side by side
            back, places = ahead, channels * conv.taps * ahead
            far_packed += 2 * packed * _outside(2 * band, l2_bytes)
            scattered = 0 if by_column else work.nnz * ahead
        products += 2 * work.nnz * back  # gradients of input and values
    grid = work.shape[0] * work.shape[1] / (work.block[0] * work.block[1])
    few = batching.too_few(count, work.precision)  # other kernels
    return {
        "call": 1.0,
        "pack_in": packed,
        "pack_out": out * ahead,
        "far_packed": far_packed,  # what L2 does not hold of a few rows of all channels
        "cut": cut,  # out of bands in L2 into L1, taps sharing what they read
        "places": places,  # of x and of its gradient, a tap at a time
        "products": 0 if few else products,
        "unpaired_products": products if few else 0,
        "scattered_products": scattered,
        "segments": grid * products / max(1, work.nnz),  # starts of a row in a tile of columns, empty or not
        "pattern": work.nnz,
        "parts": work.nnz * parts,
        "beyond_cache": _beyond(work, 2 * l2_bytes),
    }


def dense_conv_terms(work: Work, which: Pass, l2_bytes: int) -> dict[str, float]:
    """Name -> amount."""
    assert work.conv is not None
    conv, width = work.conv, activation_dtype(work.precision).itemsize
    products, out, inputs = work.nnz * work.tokens, _numbers_out(work), _numbers_in(conv)
    point, strided = conv.taps == 1, conv.stride != (1, 1)
    made = [out * width, *([inputs * width] if which == "step" else [])]
    return {
        "call": 1.0,
        "move_out": out,
        "move_in": inputs,
        "weights": work.nnz,
        "products": 0 if point or strided else products,
        "strided_products": products if strided and not point else 0,
        "point_products": products if point else 0,
        "rows": 0 if point else products / max(1, conv.size[1]),  # starts of a row of the output
        "fresh": sum(size for size in made if size >= FRESH_BYTES),
        "beyond_cache": _beyond(work, 2 * l2_bytes),
    }


def _turns(work: Work, batching: Batching) -> bool:
    """Whether the gradients are a convolution of dy (csrc/drive_conv_turned.h)."""
    conv = work.conv
    assert conv is not None and work.block is not None
    kernels = work.block == (1, 1) or (work.block[1] == 1 and batching.pairs(conv.images[0], work.precision))
    narrow = all(border <= 2 * (reach - 1) for border, reach in zip(conv.border, conv.reach, strict=True))
    return kernels and conv.stride == (1, 1) and narrow and conv.taps > 1


def _whole(count: int, each: int) -> int:
    return -(-count // each) * each


def _outside(band_bytes: int, l2_bytes: int) -> float:
    """The share of a band that L2 does not hold: half of it is for bands."""
    return max(0.0, 1.0 - l2_bytes / 2 / max(1, band_bytes))


def _band_places(conv: Convolution, pixels: int) -> int:
    """Pixels of a channel in the smallest band: what `ROWS` rows of the output read, and what strides leave out."""
    (tall, wide), (down, along) = conv.reach, conv.stride
    rows = (min(ROWS, conv.size[0]) - 1) * down + max(tall, down) + down - 1
    return rows * max(conv.border[1] // 2 + conv.images[3], (_whole(conv.size[1], pixels) - 1) * along + wide)


def _share(conv: Convolution, stride: tuple[int, int], rows_out: int, pixels: int) -> float:
    """Inputs of a channel that are cut out for the panels of some rows, over the outputs that share them."""
    at_once = max(1, min(ROWS, rows_out))
    rows = (at_once - 1) * stride[0] + conv.reach[0]
    columns = 0
    for remainder in range(stride[1]):  # what a stride leaves out is not copied
        steps = [
            tap * conv.dilation[1] // stride[1]
            for tap in range(conv.kernel[1])
            if tap * conv.dilation[1] % stride[1] == remainder
        ]
        columns += steps[-1] - steps[0] + pixels if steps else 0
    return rows * columns / (at_once * pixels)


def _numbers_in(conv: Convolution) -> int:
    count, channels, height, width = conv.images
    return count * channels * height * width


def _numbers_out(work: Work) -> int:
    return work.shape[0] * work.tokens


def _beyond(work: Work, cache_bytes: int) -> int:
    """Bytes of images that come from further away than the cache, or go there."""
    assert work.conv is not None
    width = activation_dtype(work.precision).itemsize
    return sum(max(0, numbers * width - cache_bytes) for numbers in (_numbers_in(work.conv), _numbers_out(work)))
