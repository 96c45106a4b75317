"""Sparse 2-d convolution: the four operations again, on the matrix (O, C * kh * kw) of a convolution's weight.

    N images, C and O channels, H x W and h x w pixels in and out, kh x kw taps; the rest as in `rarefy.ops.schema`

    conv2d                  y (N, O, h, w) from x (N, C, H, W)
    conv2d_backward         gradients of x, the values and the bias
    conv2d_grow_candidates  the k absent units of largest mean |dW|, best first, ties by lower unit; streamed, exact

In plain torch so far: a few unit rows at a time become the dense weight of a small convolution, so that time is the
dense layer's and no more than a tile of a dense weight or of its gradient exists at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.ops import tiled
from rarefy.ops.index import Index
from rarefy.ops.schema import INDEX_ARGUMENTS, refuse_second_derivative
from rarefy.ops.tiled import Tile

_GEOMETRY = "int[] kernel, int[] stride, int[] padding, int[] dilation"

torch.library.define(
    "rarefy::conv2d", f"(Tensor values, {INDEX_ARGUMENTS}, Tensor x, Tensor? bias, {_GEOMETRY}) -> Tensor"
)
torch.library.define(
    "rarefy::conv2d_backward",
    f"(Tensor values, {INDEX_ARGUMENTS}, Tensor dy, Tensor x, {_GEOMETRY}, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "rarefy::conv2d_grow_candidates",
    f"({INDEX_ARGUMENTS}, Tensor dy, Tensor x, {_GEOMETRY}, int k) -> (Tensor units, Tensor scores)",
)


class Geometry(NamedTuple):
    """Pairs (height, width), as torch.nn.Conv2d has them."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def out_size(self, size: int, axis: int) -> int:
        """Output pixels along an axis of `size` input pixels; below 1 where the kernel does not fit."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1


def check_conv2d(index: Index, x: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """The shape of y.

    Raises:
        RuntimeError: x has no four dimensions, other channels, no floating dtype, or is smaller than the kernel.
    """
    taps = geometry.kernel[0] * geometry.kernel[1]
    torch._check(
        x.dim() == 4 and x.shape[1] * taps == index.in_features,
        lambda: (
            f"conv2d: x must be (batch, channels = {index.in_features // taps}, height, width), got {tuple(x.shape)}"
        ),
    )
    torch._check(x.is_floating_point(), lambda: f"conv2d: x must hold floating-point numbers, got {x.dtype}")
    height, width = (geometry.out_size(x.shape[2 + axis], axis) for axis in (0, 1))
    torch._check(
        height > 0 and width > 0,
        lambda: (
            f"conv2d: a kernel of {geometry.kernel} with dilation {geometry.dilation} is larger than the input of "
            f"{tuple(x.shape[2:])} pixels with padding {geometry.padding}"
        ),
    )
    return x.shape[0], index.out_features, height, width


def _check_backward(index: Index, dy: Tensor, x: Tensor, geometry: Geometry) -> None:
    shape = check_conv2d(index, x, geometry)
    torch._check(tuple(dy.shape) == shape, lambda: f"conv2d: dy must be {shape}, got {tuple(dy.shape)}")


def _tile_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    _, stride, padding, dilation = geometry
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*needs, False]
    )


def _weight_tile(values: Tensor, index: Index, tile: Tile, geometry: Geometry) -> Tensor:
    """(rows of the tile in entries, C, kh, kw)."""
    matrix = tiled.dense_tile(values, index, tile)
    return matrix.view(matrix.shape[0], -1, *geometry.kernel)


def _rows(tile: Tile, index: Index) -> slice:
    return slice(tile.first * index.block[0], tile.last * index.block[0])


def _gradient_tiles(
    index: Index, dy: Tensor, x: Tensor, geometry: Geometry, entries: int = tiled.TILE_ENTRIES
) -> Iterator[tuple[Tile, Tensor]]:
    """The dense weight gradient, a few unit rows at a time: (tile, (rows in entries, C * kh * kw))."""
    for tile in tiled.tiles(index, entries):
        part = dy[:, _rows(tile, index)]
        like = x.new_empty(part.shape[1], x.shape[1], *geometry.kernel)
        gradient = _tile_gradients(part, x, like, geometry, [False, True])[1]
        yield tile, gradient.reshape(part.shape[1], -1)


def _conv2d(values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, kernel, stride, padding, dilation) -> Tensor:
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation),
    )
    y = x.new_empty(check_conv2d(index, x, geometry))
    x = x.to(values.dtype)
    for tile in tiled.tiles(index):
        weight = _weight_tile(values, index, tile, geometry)
        rows = _rows(tile, index)
        y[:, rows] = F.conv2d(x, weight, None if bias is None else bias[rows].to(x.dtype), stride, padding, dilation)
    return y


def _conv2d_backward(
    values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, kernel, stride, padding, dilation, needs
) -> tuple[Tensor, Tensor, Tensor]:
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation),
    )
    _check_backward(index, dy, x, geometry)
    dx = dvalues = dbias = values.new_empty(0)
    wide_dy, wide_x = dy.to(values.dtype), x.to(values.dtype)
    if needs[0]:
        dx = torch.zeros(x.shape, dtype=values.dtype, device=x.device)
        for tile in tiled.tiles(index):
            weight = _weight_tile(values, index, tile, geometry)
            dx += _tile_gradients(wide_dy[:, _rows(tile, index)], wide_x, weight, geometry, [True, False])[0]
    if needs[1]:
        dvalues = tiled.gather(index, _gradient_tiles(index, wide_dy, wide_x, geometry), values)
    if needs[2]:
        dbias = wide_dy.sum(dim=(0, 2, 3))
    return dx.to(x.dtype), dvalues, dbias


def _conv2d_grow_candidates(
    crow, cols, t_crow, t_rows, t_perm, block, dy, x, kernel, stride, padding, dilation, k
) -> tuple[Tensor, Tensor]:
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation),
    )
    _check_backward(index, dy, x, geometry)
    gradients = _gradient_tiles(index, dy, x, geometry, tiled.TILE_ENTRIES // 4)
    return tiled.best_absent(index, ((t, tiled.unit_scores(g, index.block)) for t, g in gradients), k)


@torch.library.register_fake("rarefy::conv2d")
def _(values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, kernel, stride, padding, dilation):
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    return x.new_empty(check_conv2d(index, x, Geometry(kernel, stride, padding, dilation)))


@torch.library.register_fake("rarefy::conv2d_backward")
def _(values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, kernel, stride, padding, dilation, needs):
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    _check_backward(index, dy, x, Geometry(kernel, stride, padding, dilation))
    dx = x.new_empty(x.shape if needs[0] else 0)
    dvalues = torch.empty_like(values) if needs[1] else values.new_empty(0)
    return dx, dvalues, values.new_empty(index.out_features if needs[2] else 0)


@torch.library.register_fake("rarefy::conv2d_grow_candidates")
def _(crow, cols, t_crow, t_rows, t_perm, block, dy, x, kernel, stride, padding, dilation, k):
    size = min(k, (crow.shape[0] - 1) * (t_crow.shape[0] - 1) - cols.shape[0])
    return x.new_empty(size, dtype=torch.int64), x.new_empty(size, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, *geometry = inputs
    ctx.save_for_backward(values, crow, cols, t_crow, t_rows, t_perm, x)
    ctx.block, ctx.geometry = block, geometry
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy: Tensor):
    values, *index, x = ctx.saved_tensors
    needs = [ctx.needs_input_grad[7], ctx.needs_input_grad[0], ctx.bias_dtype is not None and ctx.needs_input_grad[8]]
    with torch.no_grad():
        gradients = torch.ops.rarefy.conv2d_backward(values, *index, ctx.block, dy, x, *ctx.geometry, needs)
    dx, dvalues, dbias = refuse_second_derivative("conv2d", *gradients)
    return (
        *(dvalues if needs[1] else None, None, None, None, None, None, None),
        *(dx if needs[0] else None, dbias.to(ctx.bias_dtype) if needs[2] else None, None, None, None, None),
    )


torch.library.register_autograd("rarefy::conv2d", _backward, setup_context=_setup_context)

for _name in ("conv2d", "conv2d_backward", "conv2d_grow_candidates"):
    torch.library.impl(f"rarefy::{_name}", "CompositeExplicitAutograd", globals()[f"_{_name}"])
