"""The C++ kernels behind a sparse convolution: fp32 values on the CPU, images in fp32 or bf16; others are converted."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy.ops.geometry import Geometry
from rarefy.ops.index import Index
from rarefy.ops.library import INT64, POINTER, call, load
from rarefy.ops.memory import empty
from rarefy.ops.native import c_pattern

_TOO_WIDE = -5
"""RAREFY_TOO_WIDE of csrc/rarefy.h."""


class _CConv(ctypes.Structure):
    """`rarefy_conv` of csrc/rarefy.h."""

    _fields_ = [
        *((name, INT64) for name in ("images", "channels", "out_channels")),
        *((name, INT64 * 2) for name in ("in_size", "out_size", "kernel", "stride", "padding", "dilation")),
        *((name, POINTER) for name in ("scale", "shift")),
    ]


Affine = tuple[Tensor, Tensor]
"""(C,) scale and shift, contiguous fp32: what is convolved is ReLU(x * scale + shift)."""


def _c_conv(x_shape: tuple[int, ...], y_shape: tuple[int, ...], geometry: Geometry, affine: Affine | None) -> _CConv:
    pairs = [(INT64 * 2)(*pair) for pair in (x_shape[2:], y_shape[2:], *geometry.pairs)]
    pointers = (None, None) if affine is None else (affine[0].data_ptr(), affine[1].data_ptr())
    return _CConv(x_shape[0], x_shape[1], y_shape[1], *pairs, *pointers)


def _images(*tensors: Tensor) -> list[Tensor]:
    """As the kernels read them: channels_last, all in bf16 or all in fp32."""
    half = all(tensor.dtype is torch.bfloat16 for tensor in tensors)
    dtype = torch.bfloat16 if half else torch.float32
    return [tensor.detach().to(dtype).contiguous(memory_format=torch.channels_last) for tensor in tensors]


def _activations(images: Tensor) -> int:
    """Of csrc/rarefy.h: RAREFY_BFLOAT16, RAREFY_MEDIUM or RAREFY_FLOAT32."""
    if images.dtype is torch.bfloat16:
        return 1
    return 2 if torch.get_float32_matmul_precision() == "medium" else 0


def _new_images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Channels_last, in memory that is reused."""
    count, channels, height, width = shape
    return empty(count * height * width, channels, dtype).view(count, height, width, channels).permute(0, 3, 1, 2)


def _f32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def convolve(
    values: Tensor,
    index: Index,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    shape: tuple[int, ...],
    affine: Affine | None = None,
) -> Tensor | None:
    """y, channels_last, of that shape. None: the taps lie too far apart for the kernels."""
    values, (images,) = _f32(values), _images(x)
    offset = None if bias is None else _f32(bias)
    y, pattern = _new_images(shape, images.dtype), c_pattern(index)
    conv = _c_conv(tuple(x.shape), shape, geometry, affine)
    library = load()
    assert isinstance(library, ctypes.CDLL)
    pointers = (values.data_ptr(), images.data_ptr(), None if offset is None else offset.data_ptr(), y.data_ptr())
    arguments = (ctypes.byref(conv), ctypes.byref(pattern), *pointers, _activations(images), torch.get_num_threads())
    code = library.rarefy_convolve(*arguments)
    if code == _TOO_WIDE:
        return None
    if code:
        raise RuntimeError(f"kernel rarefy_convolve failed with code {code}")
    return y


def convolve_backward(
    values: Tensor,
    index: Index,
    dy: Tensor,
    x: Tensor,
    geometry: Geometry,
    needs: list[bool],
    affine: Affine | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dx, channels_last, dvalues and dbias; dx and dbias where `needs` asks for them. dx is of what is convolved."""
    wide, (dy_images, x_images) = _f32(values), _images(dy, x)
    dx = _new_images(tuple(x.shape), x_images.dtype) if needs[0] else None
    dvalues, dbias = torch.empty_like(wide), torch.empty(index.out_features) if needs[2] else None
    conv, pattern = _c_conv(tuple(x.shape), tuple(dy.shape), geometry, affine), c_pattern(index)
    outputs = (None if dx is None else dx.data_ptr(), dvalues.data_ptr(), None if dbias is None else dbias.data_ptr())
    inputs = (wide.data_ptr(), dy_images.data_ptr(), x_images.data_ptr())
    arguments = (
        ctypes.byref(conv),
        ctypes.byref(pattern),
        *inputs,
        *outputs,
        _activations(x_images),
        torch.get_num_threads(),
    )
    call("rarefy_convolve_backward", *arguments)
    return dx, dvalues, dbias
