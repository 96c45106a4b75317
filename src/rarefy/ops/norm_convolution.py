"""Batch norm and ReLU while a sparse convolution packs its images: what lies between is never written.

    N images, C and O channels; the rest as in `rarefy.ops.norm` and `rarefy.ops.convolution`

    norm_conv2d           y = conv2d(ReLU((x - mean) / sqrt(var + eps) * weight + bias)), and mean and var
    norm_conv2d_backward  gradients of x, the norm's weight and bias, the values and the convolution's bias

By the kernels alone: `runs_kernel` says where. The backward pass normalises once more while it packs, so that x is all
that is kept of the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.ops import backend, convolution, native, native_convolution, norm
from rarefy.ops.geometry import Geometry
from rarefy.ops.index import Index
from rarefy.ops.operator import implement, operators
from rarefy.ops.schema import INDEX_ARGUMENTS, refuse_second_derivative
from rarefy.ops.spread import spread

torch.library.define(
    "rarefy::norm_conv2d",
    f"(Tensor values, {INDEX_ARGUMENTS}, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
    f"Tensor? conv_bias, {convolution.GEOMETRY_ARGUMENTS}=1, Tensor? sink=None) -> (Tensor y, Tensor mean, Tensor var)",
)
torch.library.define(
    "rarefy::norm_conv2d_backward",
    f"(Tensor values, {INDEX_ARGUMENTS}, Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    f"float eps, bool training, {convolution.GEOMETRY_ARGUMENTS}, bool need_conv_bias, Tensor(a!)? sink=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def runs_kernel(values: Tensor, index: Index, x: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels take both. A product has no packing of its own to hide the norm in."""
    if index.expands or geometry.is_product or not norm.runs_kernel(x):
        return False
    return _chooses_native(values.dtype, values.device, tuple(index.block))


@torch.compiler.assume_constant_result  # the compiler need not see how a library is found
def _chooses_native(dtype: torch.dtype, device: torch.device, block: tuple[int, ...]) -> bool:
    return backend.choose(dtype, device, list(block)) is native


def _forward(
    values, crow, cols, t_crow, t_rows, t_perm, block, x, weight, bias, mean, var, eps, conv_bias, kernel, stride,
    padding, dilation, groups=1, sink=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation, groups),
    )
    shape = convolution.check_conv2d(index, x, geometry)
    if mean is None:
        mean, var = norm.statistics(x)
    else:
        mean, var = mean.to(torch.float32, copy=True), var.to(torch.float32, copy=True)
    scale, shift = norm.affine(weight, bias, mean, var, eps)
    whole = spread(index, groups)
    y = native_convolution.convolve(values, whole, x, conv_bias, geometry, shape, (scale, shift))
    if y is None:  # taps too far apart
        y = operators.conv2d(values, *index, _activated(x, scale, shift), conv_bias, *geometry, None)
    return y, mean, var


def _activated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.relu(torch.addcmul(shift.view(1, -1, 1, 1), x.to(torch.float32), scale.view(1, -1, 1, 1))).to(x.dtype)


def _backward(
    values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, weight, bias, mean, var, eps, training, kernel, stride,
    padding, dilation, groups, need_conv_bias, sink=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    index, geometry = (
        Index(crow, cols, t_crow, t_rows, t_perm, list(block)),
        Geometry(kernel, stride, padding, dilation, groups),
    )
    scale, shift = norm.affine(weight, bias, mean, var, eps)
    needs = [True, True, need_conv_bias]
    whole = spread(index, groups)
    dz, dvalues, dbias = native_convolution.convolve_backward(values, whole, dy, x, geometry, needs, (scale, shift))
    assert dz is not None
    dx, dweight, dshift, _ = operators.batch_norm_backward(
        dz, x, None, weight, bias, mean, var, eps, True, training, False
    )
    if sink is not None:
        convolution.feed(sink, index, dy, lambda: _activated(x, scale, shift), geometry, x.shape[0])
    nothing = values.new_empty(0)
    return dx, dweight, dshift, dvalues.to(values.dtype), nothing if dbias is None else dbias.to(values.dtype)


implement("norm_conv2d_backward", _backward)


@torch.library.register_fake("rarefy::norm_conv2d")
def _(
    values, crow, cols, t_crow, t_rows, t_perm, block, x, weight, bias, mean, var, eps, conv_bias, kernel, stride,
    padding, dilation, groups=1, sink=None,
):  # fmt: skip
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    shape = convolution.check_conv2d(index, x, Geometry(kernel, stride, padding, dilation, groups))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, *(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("rarefy::norm_conv2d_backward")
def _(
    values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, weight, bias, mean, var, eps, training, kernel, stride,
    padding, dilation, groups, need_conv_bias, sink=None,
):  # fmt: skip
    dbias = values.new_empty((crow.shape[0] - 1) * block[0] if need_conv_bias else 0)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(values), dbias


def _setup_context(ctx, inputs, output) -> None:
    values, crow, cols, t_crow, t_rows, t_perm, block, x, weight, bias, given, _, eps, conv_bias, *geometry, sink = (
        inputs
    )
    _, mean, var = output
    ctx.save_for_backward(values, crow, cols, t_crow, t_rows, t_perm, x, weight, bias, mean, var)
    ctx.block, ctx.eps, ctx.geometry, ctx.sink, ctx.training = block, eps, geometry, sink, given is None
    ctx.conv_bias_dtype = None if conv_bias is None else conv_bias.dtype
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy: Tensor | None, _mean, _var):
    if dy is None:
        return (None,) * 20
    values, *index, x, weight, bias, mean, var = ctx.saved_tensors
    with torch.no_grad():
        found = operators.norm_conv2d_backward(
            values, *index, ctx.block, dy, x, weight, bias, mean, var, ctx.eps, ctx.training, *ctx.geometry,
            ctx.conv_bias_dtype is not None, ctx.sink,
        )  # fmt: skip
    dx, dweight, dbias, dvalues, dconv_bias = refuse_second_derivative("norm_conv2d", *found)
    return (
        *(dvalues, None, None, None, None, None, None, dx),
        dweight.to(weight.dtype) if weight is not None else None,
        dbias.to(bias.dtype) if bias is not None else None,
        *(None, None, None),
        dconv_bias.to(ctx.conv_bias_dtype) if ctx.conv_bias_dtype is not None else None,
        *(None,) * 6,
    )


implement("norm_conv2d", _forward, _gradient, _setup_context)
