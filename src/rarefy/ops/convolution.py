"""Sparse 2-d convolution: schema, gradient and implementations, on the matrix (O, C / G * kh * kw) of a weight.

    N images, C and O channels, G groups of both, H x W and h x w pixels in and out, kh x kw taps; the rest as in
    `rarefy.ops.schema`

    conv2d           y (N, O, h, w) from x (N, C, H, W)
    conv2d_backward  gradients of x, the values and the bias

y and dx are channels_last where x is, else contiguous. The kernels (csrc/drive_conv.h) read and write channels_last:
other images are converted on the way. With one tap on every pixel it is a product (`spmm`), with all its kernels.
For the kernels groups are a property of the pattern: its units lie where the groups are (`rarefy.ops.spread`).
Without a kernel, and for a layer that computes dense, a few unit rows at a time become the dense weight of a small
convolution: the dense layer's time, and no more than a tile of a dense weight or of its gradient at once.

Growth looks at the rows that a linear layer would have: patches of x, some images at a time (`rarefy.ops.sink`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.ops import backend, expanded, native, native_convolution, sink, tiled
from rarefy.ops.geometry import Geometry
from rarefy.ops.index import Index
from rarefy.ops.operator import implement, operators
from rarefy.ops.schema import INDEX_ARGUMENTS, refuse_second_derivative
from rarefy.ops.spread import dense_gradient, spread
from rarefy.ops.tiled import Tile

GEOMETRY_ARGUMENTS = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"

torch.library.define(
    "rarefy::conv2d",
    f"(Tensor values, {INDEX_ARGUMENTS}, Tensor x, Tensor? bias, {GEOMETRY_ARGUMENTS}=1, Tensor? sink=None) -> Tensor",
)
torch.library.define(
    "rarefy::conv2d_backward",
    f"(Tensor values, {INDEX_ARGUMENTS}, Tensor dy, Tensor x, {GEOMETRY_ARGUMENTS}, bool[] needs, "
    "Tensor(a!)? sink=None) -> (Tensor, Tensor, Tensor)",
)

PATCH_ENTRIES = 1 << 24
"""Of x's patches that exist at once while growth looks at them: 64 MiB, or one image's."""


class _Gradients(NamedTuple):
    dx: Tensor | None
    dvalues: Tensor | None
    dbias: Tensor | None


def check_conv2d(index: Index, x: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """The shape of y.

    Raises:
        RuntimeError: x has no four dimensions, other channels, no floating dtype, or is smaller than the kernel.
    """
    taps, inputs = geometry.taps, index.in_features * geometry.groups
    torch._check(
        x.dim() == 4 and x.shape[1] * taps == inputs,
        lambda: f"conv2d: x must be (batch, channels = {inputs // taps}, height, width), got {tuple(x.shape)}",
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


def _layout(x: Tensor) -> torch.memory_format:
    """Of y and dx."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _runs_kernel(values: Tensor, index: Index) -> bool:
    return not index.expands and backend.choose(values.dtype, values.device, index.block) is native


# ---- as a product ----------------------------------------------------------------------------------------------------


def _is_product(index: Index, geometry: Geometry) -> bool:
    """With groups a layer that computes dense is none: its whole weight would be that of all groups."""
    return geometry.is_product and not (index.expands and geometry.groups > 1)


def _rows(images: Tensor) -> Tensor:
    """(N * h * w, C): no copy of what is channels_last."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    count, channels, height, width = shape
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


# ---- plain torch -----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Unit rows that are a convolution of their own: some of a group's, or those of whole groups."""

    tile: Tile
    groups: int
    outputs: slice
    """Channels of y."""
    inputs: slice
    """Channels of x."""


def _tile_dx(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    rest = (geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], groups)
    dx, _, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *rest, [True, False, False])
    return dx


def _tile_dweight(dy: Tensor, x: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """(rows of dy, C / groups, kh, kw)."""
    shape = (dy.shape[1], x.shape[1] // groups, *geometry.kernel)
    if geometry.taps == 1 and geometry.padding == [0, 0]:
        # With a stride and few inputs oneDNN writes past its workspace: wrong numbers, or a damaged heap
        # (https://github.com/uxlfoundation/oneDNN/issues/6035).
        down, right = geometry.stride
        return dense_gradient(_rows(dy), _rows(x[:, :, ::down, ::right]), groups).view(shape)
    rest = (geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], groups)
    _, dweight, _ = torch.ops.aten.convolution_backward(dy, x, x.new_empty(shape), None, *rest, [False, True, False])
    return dweight


def _parts(index: Index, geometry: Geometry) -> Iterator[_Part]:
    """All unit rows; a layer that computes dense is one part."""
    rows, (b_r, _) = index.crow.shape[0] - 1, index.block
    whole = index.expands and not backend.names_plain_torch()
    tiles = [Tile(0, rows, 0, index.num_units)] if whole else tiled.tiles(index, groups=geometry.groups)
    channels = index.in_features // geometry.taps  # of a group
    for tile in tiles:
        first, last = tiled.groups_of_tile(tile, rows, geometry.groups)
        outputs, inputs = slice(tile.first * b_r, tile.last * b_r), slice(first * channels, last * channels)
        yield _Part(tile, last - first, outputs, inputs)


def _weight_part(values: Tensor, index: Index, tile: Tile, geometry: Geometry) -> Tensor:
    """(rows of the tile in entries, C / G, kh, kw)."""
    whole = index.expands and not backend.names_plain_torch()
    matrix = expanded.weight(values, index) if whole else tiled.dense_tile(values, index, tile)
    return matrix.view(matrix.shape[0], -1, *geometry.kernel)


def _gradient_tiles(index: Index, dy: Tensor, x: Tensor, geometry: Geometry) -> Iterator[tuple[Tile, Tensor]]:
    """The dense weight gradient, a few unit rows at a time: (tile, (rows in entries, C / G * kh * kw))."""
    for tile, groups, outputs, inputs in _parts(index, geometry):
        part = _tile_dweight(dy[:, outputs], x[:, inputs], geometry, groups)
        yield tile, part.reshape(part.shape[0], -1)


def _plain(values: Tensor, index: Index, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    _, stride, padding, dilation = geometry.pairs
    wide = x.to(values.dtype)
    found = []
    for tile, groups, outputs, inputs in _parts(index, geometry):
        weight = _weight_part(values, index, tile, geometry)
        offset = None if bias is None else bias[outputs].to(values.dtype)
        found.append(F.conv2d(wide[:, inputs], weight, offset, stride, padding, dilation, groups))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _plain_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, geometry: Geometry, needs: list[bool]
) -> _Gradients:
    dy, x = dy.to(values.dtype), x.to(values.dtype)
    dx = dvalues = None
    if needs[0]:
        dx = torch.zeros_like(x)
        for tile, groups, outputs, inputs in _parts(index, geometry):
            weight = _weight_part(values, index, tile, geometry)
            dx[:, inputs] += _tile_dx(dy[:, outputs], x[:, inputs], weight, geometry, groups)
    if needs[1]:
        dvalues = tiled.gather(index, _gradient_tiles(index, dy, x, geometry), values)
    return _Gradients(dx, dvalues, dy.sum(dim=(0, 2, 3)) if needs[2] else None)


# ---- the operators ---------------------------------------------------------------------------------------------------


def _conv2d(
    values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, kernel, stride, padding, dilation, groups=1, sink=None
) -> Tensor:
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation, groups),
    )
    shape = check_conv2d(index, x, geometry)
    y = None
    if _is_product(index, geometry):
        y = _images(operators.spmm(values, *spread(index, groups), _rows(x), bias, None), shape)
    elif _runs_kernel(values, index):
        y = native_convolution.convolve(values, spread(index, groups), x, bias, geometry, shape)
    if y is None:
        y = _plain(values, index, x, bias, geometry)
    return y.to(x.dtype, memory_format=_layout(x))


def _conv2d_backward(
    values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, kernel, stride, padding, dilation, groups, needs,
    sink=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation, groups),
    )
    _check_backward(index, dy, x, geometry)
    if _is_product(index, geometry):
        dx, dvalues, dbias = operators.spmm_backward(values, *spread(index, groups), _rows(dy), _rows(x), needs)
        found = _Gradients(_images(dx, tuple(x.shape)) if needs[0] else None, dvalues, dbias)
    elif _runs_kernel(values, index):
        whole = spread(index, groups)
        found = _Gradients(*native_convolution.convolve_backward(values, whole, dy, x, geometry, needs))
    else:
        found = _plain_backward(values, index, dy, x, geometry, needs)
    if sink is not None:
        feed(sink, index, dy, lambda: x, geometry, x.shape[0])
    return (
        x.new_empty(0) if found.dx is None else found.dx.to(x.dtype, memory_format=_layout(x)),
        values.new_empty(0) if found.dvalues is None or not needs[1] else found.dvalues.to(values.dtype),
        values.new_empty(0) if found.dbias is None or not needs[2] else found.dbias.to(values.dtype),
    )


def feed(
    layer_sink: Tensor, index: Index, dy: Tensor, make_x: Callable[[], Tensor], geometry: Geometry, count: int
) -> None:
    """Patches of a few images at a time, each a backward call of the layer: their gradients add up.

    Args:
        make_x: the images; only called if someone waits for them.
        count: N.
    """
    inputs = index.in_features * geometry.groups
    patch_entries = inputs * math.prod(dy.shape[2:])
    images = max(1, PATCH_ENTRIES // max(1, patch_entries))

    kernel, stride, padding, dilation = (tuple(pair) for pair in geometry.pairs)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        x = make_x()
        wide = torch.promote_types(x.dtype, torch.float32)
        for some_dy, some_x in zip(dy.split(images), x.split(images), strict=True):
            patches = F.unfold(some_x.to(wide), kernel, dilation, padding, stride)
            yield _rows(some_dy), patches.transpose(1, 2).reshape(-1, inputs)

    sink.feed_parts(layer_sink, index, max(1, -(-count // images)), parts)


@torch.library.register_fake("rarefy::conv2d")
def _(
    values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, kernel, stride, padding, dilation, groups=1, sink=None
):
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    shape = check_conv2d(index, x, Geometry(kernel, stride, padding, dilation, groups))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


@torch.library.register_fake("rarefy::conv2d_backward")
def _(
    values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, kernel, stride, padding, dilation, groups, needs,
    sink=None,
):  # fmt: skip
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    _check_backward(index, dy, x, Geometry(kernel, stride, padding, dilation, groups))
    dx = x.new_empty(0)
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    dvalues = torch.empty_like(values) if needs[1] else values.new_empty(0)
    return dx, dvalues, values.new_empty(index.out_features if needs[2] else 0)


def _setup_context(ctx, inputs, output) -> None:
    values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, *geometry, ctx.sink = inputs
    ctx.save_for_backward(values, crow, cols, t_crow, t_rows, t_perm, x)
    ctx.block, ctx.geometry = block, geometry
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy: Tensor):
    values, *index, x = ctx.saved_tensors
    needs = [ctx.needs_input_grad[7], ctx.needs_input_grad[0], ctx.bias_dtype is not None and ctx.needs_input_grad[8]]
    with torch.no_grad():
        gradients = operators.conv2d_backward(values, *index, ctx.block, dy, x, *ctx.geometry, needs, ctx.sink)
    dx, dvalues, dbias = refuse_second_derivative("conv2d", *gradients)
    return (
        *(dvalues if needs[1] else None, None, None, None, None, None, None),
        *(dx if needs[0] else None, dbias.to(ctx.bias_dtype) if needs[2] else None, *(None,) * 6),
    )


implement("conv2d", _conv2d, _backward, _setup_context)
implement("conv2d_backward", _conv2d_backward)
