"""Layer normalisation with the addition before it, and the cast and the token shift behind it, as one operator: schema,
gradient, reference and CPU kernel.

    R rows (tokens), C features

    x             (R, C)  the residual stream, fp32
    delta         (R, C)  what is added to it first; None: nothing
    sum           (R, C)  x + delta, fp32; empty without delta, as it is x then
    y             (R, C)  (sum - mean) / sqrt(var + eps) * weight + bias, in the dtype asked for. With a period
                          P > 0 rows are sequences of P, and the last C // 2 features come from the row before,
                          zeros in the first of a sequence (`token_shift`)
    mean, rstd    (R,)    fp32, for the backward pass; rstd = 1 / sqrt(var + eps), var without Bessel's
                          correction

    add_layer_norm            sum, y, mean, rstd
    add_layer_norm_backward   gradients of x, delta, weight and bias, from those of y and sum

The kernel (csrc/layer_norm.h) makes one pass over the rows forward and one backward, where separate layers and casts
make three. Bits do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.ops import backend
from rarefy.ops.library import INT64, POINTER, call, load
from rarefy.ops.memory import empty
from rarefy.ops.operator import implement, operators
from rarefy.ops.schema import refuse_second_derivative

torch.library.define(
    "rarefy::add_layer_norm",
    "(Tensor x, Tensor? delta, Tensor weight, Tensor bias, float eps, ScalarType dtype, int period=0) "
    "-> (Tensor sum, Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "rarefy::add_layer_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd, ScalarType? delta_dtype, "
    "int period=0) "
    "-> (Tensor dx, Tensor ddelta, Tensor dweight, Tensor dbias)",
)

_ELEMENTS = (torch.float32, torch.bfloat16)


class _CLayerNorm(ctypes.Structure):
    """`rarefy_layer_norm` of csrc/rarefy.h."""

    _fields_ = [
        *((name, INT64) for name in ("rows", "width")),
        *((name, ctypes.c_int32) for name in ("half_delta", "half_y")),
        ("eps", ctypes.c_float),
        *((name, POINTER) for name in ("weight", "bias")),
        ("period", INT64),
    ]


def runs_kernel(x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such activations; else torch's own layers do as well."""
    known = x.dtype == torch.float32 and dtype in _ELEMENTS and (delta is None or delta.dtype in _ELEMENTS)
    return known and x.device.type == "cpu" and x.numel() > 0 and _has_library() and not backend.names_plain_torch()


@torch.compiler.assume_constant_result  # the compiler need not see how a library is found
def _has_library() -> bool:
    return not isinstance(load(), str)


def _forward(x, delta, weight, bias, eps, dtype, period=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_period(x, period)
    if not runs_kernel(x, delta, dtype):
        return _reference(x, delta, weight, bias, eps, dtype, period)
    rows, width = x.shape
    x, scale, shift = x.contiguous(), *(t.detach().to(torch.float32).contiguous() for t in (weight, bias))
    delta = None if delta is None else delta.contiguous()
    total = x.new_empty(0, 0) if delta is None else empty(rows, width)
    y, mean, rstd = empty(rows, width, dtype), torch.empty(rows), torch.empty(rows)
    halves = (delta is not None and delta.dtype == torch.bfloat16, dtype == torch.bfloat16)
    norm = _CLayerNorm(rows, width, *halves, eps, scale.data_ptr(), shift.data_ptr(), period)
    added = (None, None) if delta is None else (delta.data_ptr(), total.data_ptr())
    outputs = (y.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    call("rarefy_layer_norm_forward", ctypes.byref(norm), x.data_ptr(), *added, *outputs, torch.get_num_threads())
    return total, y, mean, rstd


def _backward(dy, dsum, total, weight, mean, rstd, delta_dtype, period=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_period(total, period)
    if not (runs_kernel(total, None, dy.dtype) and (delta_dtype is None or delta_dtype in _ELEMENTS)):
        return _reference_backward(dy, dsum, total, weight, mean, rstd, delta_dtype, period)
    rows, width = total.shape
    dy, total, scale = dy.contiguous(), total.contiguous(), weight.detach().to(torch.float32).contiguous()
    dsum = None if dsum is None else dsum.to(torch.float32).contiguous()
    dx, dweight, dbias = empty(rows, width), torch.empty(width), torch.empty(width)
    ddelta = empty(rows, width, torch.bfloat16) if delta_dtype == torch.bfloat16 else dx.new_empty(0, 0)
    halves = (delta_dtype == torch.bfloat16, dy.dtype == torch.bfloat16)
    norm = _CLayerNorm(rows, width, *halves, 0.0, scale.data_ptr(), None, period)
    inputs = (
        dy.data_ptr(),
        None if dsum is None else dsum.data_ptr(),
        total.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    outputs = (dx.data_ptr(), ddelta.data_ptr() if ddelta.numel() else None, dweight.data_ptr(), dbias.data_ptr())
    call("rarefy_layer_norm_backward", ctypes.byref(norm), *inputs, *outputs, torch.get_num_threads())
    return dx, ddelta, dweight, dbias


# ---- reference -------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _reference(x, delta, weight, bias, eps, dtype, period) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x if delta is None else x + delta.to(x.dtype)
    var, mean = torch.var_mean(_wide(wide), dim=1, correction=0)
    y = F.layer_norm(_wide(wide), x.shape[1:], _wide(weight), _wide(bias), eps).to(dtype)
    if period > 0:
        y = token_shift(y.view(-1, period, y.shape[1])).view_as(y)
    return x.new_empty(0, 0) if delta is None else wide, y, mean, (var + eps).rsqrt()


def _reference_backward(
    dy, dsum, total, weight, mean, rstd, delta_dtype, period
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if period > 0:
        dy = _shift_back(dy.view(-1, period, dy.shape[1])).view_as(dy)
    wide, d = _wide(total), _wide(dy)
    normed = (wide - mean[:, None]) * rstd[:, None]
    g = d * _wide(weight)
    dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))
    dx = (dx if dsum is None else dx + dsum).to(total.dtype)
    half = delta_dtype not in (None, torch.float32, torch.float64)
    return dx, dx.to(delta_dtype) if half else dx.new_empty(0, 0), (d * normed).sum(0), d.sum(0)


def token_shift(x_BTC: Tensor) -> Tensor:
    """(B, T, C): the last C // 2 features of a token are those of the token before, zeros in the first.

    The cheapest way to see the neighbour: no weights and no arithmetic (Peng et al. 2023, RWKV, arXiv:2305.13048,
    section 3.1, mix a learned share of every feature).
    """
    C = x_BTC.shape[-1]
    own, shifted = x_BTC.split([C - C // 2, C // 2], dim=-1)
    return torch.cat([own, F.pad(shifted, (0, 0, 1, 0))[:, :-1]], dim=-1)


def _shift_back(x_BTC: Tensor) -> Tensor:
    """The transpose of `token_shift`."""
    C = x_BTC.shape[-1]
    own, shifted = x_BTC.split([C - C // 2, C // 2], dim=-1)
    return torch.cat([own, F.pad(shifted, (0, 0, 0, 1))[:, 1:]], dim=-1)


def _check_period(x: Tensor, period: int) -> None:
    if period < 0 or (period > 0 and x.shape[0] % period != 0):
        raise ValueError(
            f"add_layer_norm: the period must be 0 or the rows of a sequence, of which {x.shape[0]} is a multiple, "
            f"got {period}"
        )


# ---- shapes and gradient ---------------------------------------------------------------------------------------------

implement("add_layer_norm_backward", _backward)


@torch.library.register_fake("rarefy::add_layer_norm")
def _(x, delta, weight, bias, eps, dtype, period=0):
    statistics = [x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    total = x.new_empty(0, 0) if delta is None else x.new_empty(x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), *statistics


@torch.library.register_fake("rarefy::add_layer_norm_backward")
def _(dy, dsum, total, weight, mean, rstd, delta_dtype, period=0):
    half = delta_dtype not in (None, torch.float32, torch.float64)
    ddelta = total.new_empty(total.shape, dtype=delta_dtype) if half else total.new_empty(0, 0)
    weights = [mean.new_empty(total.shape[1]) for _ in range(2)]
    return total.new_empty(total.shape), ddelta, *weights


def _setup_context(ctx, inputs, output) -> None:
    x, delta, weight, bias, _, _, ctx.period = inputs
    total, _, mean, rstd = output
    ctx.delta_dtype = None if delta is None else delta.dtype
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x if delta is None else total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dsum: Tensor | None, dy: Tensor | None, _mean, _rstd):
    total, weight, mean, rstd = ctx.saved_tensors
    if ctx.delta_dtype is None:
        dsum = None  # sum is empty
    if dy is None:
        return dsum, None if dsum is None else dsum.to(ctx.delta_dtype), None, None, None, None, None
    with torch.no_grad():
        inputs = (dy, dsum, total, weight, mean, rstd, ctx.delta_dtype, ctx.period)
        found = operators.add_layer_norm_backward(*inputs)
    dx, ddelta, dweight, dbias = refuse_second_derivative("layer norm", *found)
    if ctx.delta_dtype is None:
        ddelta = None
    elif ctx.delta_dtype == dx.dtype:
        ddelta = dx
    return dx, ddelta, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None, None


implement("add_layer_norm", _forward, _gradient, _setup_context)


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    shift: bool = False,
) -> tuple[Tensor, Tensor]:
    """See the page, for activations (..., C). Returns x + delta (x itself without delta), and y.

    Args:
        shift: shift y by a token (`token_shift`), within sequences along the last dimension but one.
    Raises:
        ValueError: delta has another shape than x, or weight or bias is not (C,), or there is nothing to shift along.
    """
    if shift and x.dim() < 2:
        raise ValueError(f"add_layer_norm: a shift needs activations (..., tokens, features), got {tuple(x.shape)}")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"add_layer_norm: delta must be {tuple(x.shape)} like x, got {tuple(delta.shape)}")
    width = x.shape[-1]
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"add_layer_norm: weight and bias must be ({width},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    rows = (t if t is None else t.reshape(-1, width) for t in (x, delta))
    total, y, _, _ = operators.add_layer_norm(*rows, weight, bias, eps, dtype, x.shape[-2] if shift else 0)
    return x if delta is None else total.view(x.shape), y.view(x.shape)
