"""Batch normalisation of images with what follows it, a residual and ReLU, as one operator: schema, gradient, reference
and CPU kernel.

    N images, C channels, h x w pixels

    x, residual, y  (N, C, h, w)
    mean, var       (C,) fp32: of the batch in training, without Bessel's correction; else those that were given

    batch_norm           y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), act being ReLU or nothing
    batch_norm_backward  gradients of x, weight, bias and the residual

The kernel (csrc/norm.h) takes channels_last images in fp32 or bf16: two passes forward and two backward, O(C) scratch.
Other images go through torch's own layers. Bits do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy.ops import backend
from rarefy.ops.library import INT64, POINTER, call, load
from rarefy.ops.memory import empty
from rarefy.ops.operator import implement, operators
from rarefy.ops.schema import refuse_second_derivative

_ARGUMENTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias"

torch.library.define(
    "rarefy::batch_norm",
    f"({_ARGUMENTS}, Tensor? mean, Tensor? var, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor var)",
)
torch.library.define(
    "rarefy::batch_norm_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool relu, "
    "bool training, bool needs_residual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)


class _CNorm(ctypes.Structure):
    """`rarefy_norm` of csrc/rarefy.h."""

    _fields_ = [
        *((name, INT64) for name in ("rows", "channels")),
        *((name, ctypes.c_int32) for name in ("half", "relu", "training")),
        ("eps", ctypes.c_float),
        *((name, POINTER) for name in ("weight", "bias", "mean", "var")),
    ]


def runs_kernel(*images: Tensor) -> bool:
    """Whether the kernel takes such images; else torch's own layers do as well."""
    first = images[0]
    alike = all(
        x.dim() == 4
        and x.dtype is first.dtype
        and x.shape == first.shape
        and x.is_contiguous(memory_format=torch.channels_last)
        for x in images
    )
    known = first.device.type == "cpu" and first.dtype in (torch.float32, torch.bfloat16) and first.numel() > 0
    return alike and known and _has_library() and not backend.names_plain_torch()


@torch.compiler.assume_constant_result  # the compiler need not see how a library is found
def _has_library() -> bool:
    return not isinstance(load(), str)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _new_images(like: Tensor) -> Tensor:
    """Channels_last, in memory that is reused."""
    count, channels, height, width = like.shape
    return empty(_rows(like), channels, like.dtype).view(count, height, width, channels).permute(0, 3, 1, 2)


def _f32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _c_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    flags: tuple[bool, bool],
) -> _CNorm:
    """Pointers into the tensors, which must outlive the call. flags: relu, training."""
    pointers = (_pointer(weight), _pointer(bias), mean.data_ptr(), var.data_ptr())
    return _CNorm(_rows(x), x.shape[1], x.dtype is torch.bfloat16, *flags, eps, *pointers)


def _forward(x, residual, weight, bias, mean, var, eps, relu) -> tuple[Tensor, Tensor, Tensor]:
    training = mean is None
    if not runs_kernel(x, *([] if residual is None else [residual])):
        return _reference(x, residual, weight, bias, mean, var, eps, relu)
    scale, shift = _f32(weight), _f32(bias)
    mean = torch.empty(x.shape[1]) if training else mean.to(torch.float32, copy=True)
    var = torch.empty(x.shape[1]) if training else var.to(torch.float32, copy=True)
    y = _new_images(x)
    norm = _c_norm(x, scale, shift, mean, var, eps, (relu, training))
    pointers = (x.data_ptr(), _pointer(residual), y.data_ptr())
    call("rarefy_norm_forward", ctypes.byref(norm), *pointers, torch.get_num_threads())
    return y, mean, var


def _backward(
    dy, x, y, weight, bias, mean, var, eps, relu, training, needs_residual
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = dy.to(x.dtype, memory_format=torch.channels_last) if runs_kernel(x) else dy
    if not runs_kernel(x, dy, *([] if y is None else [y])):
        return _reference_backward(dy, x, y, weight, bias, mean, var, eps, relu, training, needs_residual)
    scale, shift = _f32(weight), _f32(bias)
    dweight, dbias = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    dx, dresidual = _new_images(x), _new_images(x) if needs_residual else None
    norm = _c_norm(x, scale, shift, mean, var, eps, (relu, training))
    inputs = (dy.data_ptr(), x.data_ptr(), _pointer(y))
    outputs = (dx.data_ptr(), _pointer(dresidual), dweight.data_ptr(), dbias.data_ptr())
    call("rarefy_norm_backward", ctypes.byref(norm), *inputs, *outputs, torch.get_num_threads())
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and var of the batch, by the kernel: see `runs_kernel`."""
    mean, var = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    norm = _c_norm(x, None, None, mean, var, 0.0, (False, True))
    call("rarefy_norm_forward", ctypes.byref(norm), x.data_ptr(), None, None, torch.get_num_threads())
    return mean, var


def affine(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(C,) fp32 scale and shift, of which the norm is x * scale + shift."""
    scale = (var.to(torch.float32) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.detach().to(torch.float32)
    shift = -mean.to(torch.float32) * scale
    return scale.contiguous(), (shift if bias is None else shift + bias.detach().to(torch.float32)).contiguous()


# ---- reference -------------------------------------------------------------------------------------------------------


def _per_channel(tensor: Tensor | None, missing: float, like: Tensor) -> Tensor:
    if tensor is None:
        return like.new_full((1, like.shape[1], 1, 1), missing)
    return tensor.to(like.dtype).view(1, -1, 1, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activation_input(x, residual, weight, bias, mean, var, eps) -> tuple[Tensor, Tensor]:
    """Normalised x, and what the activation takes."""
    normed = (x - _per_channel(mean, 0.0, x)) * (_per_channel(var, 1.0, x) + eps).rsqrt()
    z = normed * _per_channel(weight, 1.0, x) + _per_channel(bias, 0.0, x)
    return normed, z if residual is None else z + residual.to(x.dtype)


def _reference(x, residual, weight, bias, mean, var, eps, relu) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x)
    if mean is None:
        var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    else:
        mean, var = mean.to(wide.dtype, copy=True), var.to(wide.dtype, copy=True)
    z = _activation_input(wide, residual, weight, bias, mean, var, eps)[1]
    y = torch.empty_like(x)  # in x's layout
    return y.copy_(z.relu() if relu else z), mean, var


def _reference_backward(
    dy, x, y, weight, bias, mean, var, eps, relu, training, needs_residual
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, d = _wide(x), _wide(dy)
    normed, z = _activation_input(wide, None, weight, bias, mean, var, eps)
    if relu:
        d = d * ((z if y is None else y) > 0)
    dbias, dweight = d.sum(dim=(0, 2, 3)), (d * normed).sum(dim=(0, 2, 3))
    centred = d
    if training:
        count = _rows(x)
        centred = d - _per_channel(dbias / count, 0.0, d) - normed * _per_channel(dweight / count, 0.0, d)
    scale = _per_channel(weight, 1.0, wide) * (_per_channel(var, 1.0, wide) + eps).rsqrt()
    dx, dresidual = torch.empty_like(x).copy_(centred * scale), x.new_empty(0)
    return dx, dweight, dbias, torch.empty_like(x).copy_(d) if needs_residual else dresidual


# ---- shapes and gradient ---------------------------------------------------------------------------------------------


implement("batch_norm_backward", _backward)


@torch.library.register_fake("rarefy::batch_norm")
def _(x, residual, weight, bias, mean, var, eps, relu):
    statistics = [x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    return torch.empty_like(x), *statistics


@torch.library.register_fake("rarefy::batch_norm_backward")
def _(dy, x, y, weight, bias, mean, var, eps, relu, training, needs_residual):
    dresidual = torch.empty_like(x) if needs_residual else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), dresidual


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, given_mean, _, ctx.eps, ctx.relu = inputs
    y, mean, var = output
    ctx.training = given_mean is None
    # Without a residual the sign of what the activation took follows from x.
    ctx.save_for_backward(x, y if residual is not None and ctx.relu else None, weight, bias, mean, var)
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy: Tensor | None, _mean, _var):
    if dy is None:
        return (None,) * 8
    x, y, weight, bias, mean, var = ctx.saved_tensors
    with torch.no_grad():
        found = operators.batch_norm_backward(
            dy, x, y, weight, bias, mean, var, ctx.eps, ctx.relu, ctx.training, ctx.needs_input_grad[1]
        )
    dx, dweight, dbias, dresidual = refuse_second_derivative("batch norm", *found)
    return (
        dx,
        dresidual if ctx.needs_input_grad[1] else None,
        dweight.to(weight.dtype) if weight is not None else None,
        dbias.to(bias.dtype) if bias is not None else None,
        *(None,) * 4,
    )


implement("batch_norm", _forward, _gradient, _setup_context)


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    *,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the page; mean and var None: those of the batch. Returns y, mean and var.

    Raises:
        ValueError: x has no four dimensions, or a residual of another shape.
    """
    if x.dim() != 4:
        raise ValueError(f"batch_norm: x must be (images, channels, height, width), got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"batch_norm: the residual must be {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    return operators.batch_norm(x, residual, weight, bias, mean, var, eps, relu)
