"""The op behind a sparse MLP: two sparse matrices with an activation between them, as one call forward and one backward.

    mlp   z = x W_up^T + up_bias,  y = act(z) W_down^T + down_bias     (B, I) -> (B, O), with H hidden features

Its second result is z for the backward pass, (ceil(B / 64), H, 64) of dtype `saved`: groups of 64 tokens, feature-major,
which is how the kernels hold it; what stands at tokens past the last is undefined. act(z) is computed anew in backward.
Cost as for two `spmm`; memory B * H of `saved`, half of what two layers and an activation keep.

Where the kernels do not know dtype, device or block, or where growth looks on (`rarefy.ops.sink`), the same is composed of
`spmm`, the activation, and `spmm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.ops import native, sink
from rarefy.ops.backend import choose
from rarefy.ops.index import Index
from rarefy.ops.schema import check_backward, check_spmm

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "squared_relu")
"""In the order of csrc/rarefy.h."""

SAVED_TOKENS = 64
"""RAREFY_SAVED_TOKENS of csrc/rarefy.h."""

FUSED_TOKENS = 64
"""Below, the kernels for few tokens are faster one matrix at a time."""

_INDEX = "Tensor {0}_crow, Tensor {0}_cols, Tensor {0}_t_crow, Tensor {0}_t_rows, Tensor {0}_t_perm, int[] {0}_block"
_MATRICES = f"Tensor up_values, {_INDEX.format('up')}, Tensor down_values, {_INDEX.format('down')}"

torch.library.define(
    "rarefy::mlp",
    f"({_MATRICES}, Tensor x, Tensor? up_bias, Tensor? down_bias, str activation, ScalarType saved, "
    "Tensor? up_sink=None, Tensor? down_sink=None) -> (Tensor, Tensor)",
)
torch.library.define(
    "rarefy::mlp_backward",
    f"({_MATRICES}, Tensor dy, Tensor x, Tensor z, str activation, bool[] needs, "
    "Tensor(a!)? up_sink=None, Tensor(b!)? down_sink=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class Matrices(NamedTuple):
    """The first arguments of both ops."""

    up_values: Tensor
    up: Index
    down_values: Tensor
    down: Index

    @classmethod
    def of(cls, *flat) -> Matrices:
        up, down = Index(*flat[1:6], list(flat[6])), Index(*flat[8:13], list(flat[13]))
        return cls(flat[0], up, flat[7], down)


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z) in plain torch."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    return F.relu(z) if activation == "relu" else F.relu(z).square()


def _activate_backward(dh: Tensor, z: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(dh, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu":
        return aten.silu_backward(dh, z)
    slope = aten.threshold_backward(dh, z, 0)
    return slope if activation == "relu" else slope * 2 * F.relu(z)


def pack(z: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H) to (ceil(B / 64), H, 64), zeros at tokens past the last."""
    padded = F.pad(z, (0, 0, 0, -z.shape[0] % SAVED_TOKENS)).to(dtype)
    return padded.view(-1, SAVED_TOKENS, z.shape[1]).transpose(1, 2).contiguous()


def unpack(z: Tensor, tokens: int) -> Tensor:
    """The reverse: (B, H)."""
    return z.transpose(1, 2).reshape(-1, z.shape[1])[:tokens]


def _check(m: Matrices, x: Tensor, activation: str) -> None:
    check_spmm(m.up.crow, m.up.t_crow, m.up.block, x)
    torch._check(
        m.up.out_features == m.down.in_features,
        lambda: f"mlp: the first matrix has {m.up.out_features} outputs, the second {m.down.in_features} inputs",
    )
    torch._check(activation in ACTIVATIONS, lambda: f"mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")


@torch.library.register_fake("rarefy::mlp")
def _(*arguments):
    m, (x, _up_bias, _down_bias, activation, saved, *_) = Matrices.of(*arguments[:14]), arguments[14:]
    _check(m, x, activation)
    groups = (x.shape[0] + SAVED_TOKENS - 1) // SAVED_TOKENS
    z = x.new_empty(groups, m.up.out_features, SAVED_TOKENS, dtype=saved)
    return x.new_empty(x.shape[0], m.down.out_features), z


@torch.library.register_fake("rarefy::mlp_backward")
def _(*arguments):
    m, (dy, x, z, _activation, needs, *_) = Matrices.of(*arguments[:14]), arguments[14:]
    check_backward("mlp", m.down.crow, m.down.t_crow, m.down.block, dy, None)
    results = (
        x.new_empty(x.shape),
        torch.empty_like(m.up_values),
        m.up_values.new_empty(m.up.out_features),
        torch.empty_like(m.down_values),
        m.down_values.new_empty(m.down.out_features),
    )
    return tuple(r if need else r.new_empty(0) for r, need in zip(results, needs, strict=True))


def _fused(m: Matrices, x: Tensor, saved: torch.dtype) -> bool:
    """Whether the kernels take the whole MLP at once."""
    chosen = [choose(v.dtype, v.device, i.block) for v, i in ((m.up_values, m.up), (m.down_values, m.down))]
    fitting = {x.dtype, saved} <= {torch.float32, torch.bfloat16} and m.up_values.dtype == torch.float32
    return chosen == [native, native] and fitting and x.shape[0] >= FUSED_TOKENS


def _mlp(*arguments):
    m, (x, up_bias, down_bias, activation, saved, *_) = Matrices.of(*arguments[:14]), arguments[14:]
    _check(m, x, activation)
    if _fused(m, x, saved):
        return native.mlp(m, x, up_bias, down_bias, ACTIVATIONS.index(activation), saved)
    z = pack(choose(m.up_values.dtype, x.device, m.up.block).spmm(m.up_values, m.up, x, up_bias), saved)
    h = activate(unpack(z, x.shape[0]).to(x.dtype), activation)
    return choose(m.down_values.dtype, x.device, m.down.block).spmm(m.down_values, m.down, h, down_bias), z


def _mlp_backward(*arguments):
    m, (dy, x, z, activation, needs, up_sink, down_sink) = Matrices.of(*arguments[:14]), arguments[14:]
    sinks = [given for given in (up_sink, down_sink) if given is not None]
    if _fused(m, x, z.dtype) and not any(map(sink.armed, sinks)):
        for given in sinks:
            sink.count(given)
        gradients = native.mlp_backward(m, dy, x, z, ACTIVATIONS.index(activation), needs)
    else:
        z_rows = unpack(z, x.shape[0]).to(x.dtype)
        h, spmm_backward = activate(z_rows, activation), torch.ops.rarefy.spmm_backward
        dh, *down = spmm_backward(m.down_values, *m.down, dy, h, [True, needs[3], needs[4]], down_sink)
        dz = _activate_backward(dh, z_rows, activation)
        dx, *up = spmm_backward(m.up_values, *m.up, dz, x, list(needs[:3]), up_sink)
        gradients = (dx, *up, *down)
    return tuple(g if need else x.new_empty(0) for g, need in zip(gradients, needs, strict=True))


for _name in ("mlp", "mlp_backward"):
    torch.library.impl(f"rarefy::{_name}", "CompositeExplicitAutograd", globals()[f"_{_name}"])


def _setup_context(ctx, inputs, output) -> None:
    matrices, (x, up_bias, down_bias, activation, _saved, *sinks) = inputs[:14], inputs[14:]
    ctx.blocks = matrices[6], matrices[13]
    ctx.save_for_backward(*matrices[:6], *matrices[7:13], x, output[1])
    ctx.biases = [None if bias is None else bias.dtype for bias in (up_bias, down_bias)]
    ctx.activation = activation
    ctx.sinks = sinks  # not saved as the rest are: the backward writes to them
    ctx.set_materialize_grads(False)  # of z, which has none


def _backward(ctx, dy: Tensor | None, _dz: Tensor | None):
    if dy is None:
        return (None,) * 21
    *matrices, x, z = ctx.saved_tensors
    matrices = (*matrices[:6], ctx.blocks[0], *matrices[6:], ctx.blocks[1])
    need = ctx.needs_input_grad
    with_bias = [dtype is not None and need[at] for at, dtype in zip((15, 16), ctx.biases, strict=True)]
    needs = [need[14], need[0], with_bias[0], need[7], with_bias[1]]
    with torch.no_grad():
        gradients = torch.ops.rarefy.mlp_backward(*matrices, dy, x, z, ctx.activation, needs, *ctx.sinks)
    if torch.is_grad_enabled():  # create_graph=True: a missing second derivative must raise, not count as zero
        delayed_error = torch._C._functions.DelayedError  # pyright: ignore[reportAttributeAccessIssue]
        refuse = delayed_error("rarefy's mlp has no second derivative", len(gradients))
        gradients = refuse(*(gradient.requires_grad_() for gradient in gradients))
    dx, d_up, d_up_bias, d_down, d_down_bias = (
        gradient if wanted else None for gradient, wanted in zip(gradients, needs, strict=True)
    )
    biases = (
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip((d_up_bias, d_down_bias), ctx.biases, strict=True)
    )
    return d_up, *(None,) * 6, d_down, *(None,) * 6, dx, *biases, None, None, None, None


torch.library.register_autograd("rarefy::mlp", _backward, setup_context=_setup_context)
