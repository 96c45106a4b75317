"""Causal attention on the output of a fused projection: schema, gradient, reference and the CPU kernel, on one page.

    B sequences, T tokens, H heads, c features a head.

    qkv   (B, T, 3, H, c)   query, key and value of each token, as nn.Linear(C, 3 C) writes them
    out   (B, T, H, c)      as nn.Linear(C, C) reads it
    lse   (B, H, T)         logarithm of each softmax's denominator, for the backward pass
    rotary (T, c)           float32, `rarefy.ops.rotary_table`: by what queries and keys are turned first, if at all

    causal_attention            out of token t = the mean of the values up to t, weighted by softmax(q k^T / sqrt(c))
    causal_attention_backward   dqkv from dout

The kernel (csrc/attention.h) computes what lies below the diagonal only and copies nothing: T^2 c H B multiplications
forward and 2.5 times as many backward, O(T c) scratch a thread. It turns queries and keys while it
packs them. Its bits do not depend on the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.ops import backend
from rarefy.ops.library import call, load
from rarefy.ops.memory import empty
from rarefy.ops.operator import implement, operators
from rarefy.ops.rotary import rotate
from rarefy.ops.schema import refuse_second_derivative

torch.library.define("rarefy::causal_attention", "(Tensor qkv, Tensor? rotary=None) -> (Tensor out, Tensor lse)")
torch.library.define(
    "rarefy::causal_attention_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? rotary=None) -> Tensor",
)


def causal_attention(qkv: Tensor, rotary: Tensor | None = None) -> Tensor:
    """(B, T, 3, H, c) -> (B, T, H, c), by the kernel where there is one for the dtype and device, else by torch's.

    Args:
        rotary: (T, c) float32, from `rarefy.ops.rotary_table`: queries and keys are turned by their positions; no
            gradient flows to it. None: they are taken as they are.
    Raises:
        ValueError: qkv or rotary has another shape or dtype, or a backend was named (`rarefy.ops.using`) that cannot.
    """
    _check(qkv, rotary)
    return operators.causal_attention(qkv, rotary)[0] if _runs_kernel(qkv) else reference(qkv, rotary)


def reference(qkv: Tensor, rotary: Tensor | None = None) -> Tensor:
    """The specification, and what runs without the kernel: any device and dtype, differentiable as torch's own is."""
    q, k, v = _turned(qkv, rotary).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _turned(qkv: Tensor, rotary: Tensor | None) -> Tensor:
    """With queries and keys turned; a copy, if there is anything to turn."""
    if rotary is None:
        return qkv
    B, T, _, H, c = qkv.shape
    turned = rotate(qkv[:, :, :2].reshape(B, T, 2 * H, c), rotary).view(B, T, 2, H, c)
    return torch.cat([turned, qkv[:, :, 2:]], dim=2)


def _check(qkv: Tensor, rotary: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(
            f"causal_attention: qkv must be (batch, tokens, 3, heads, head_dim), got {tuple(qkv.shape)}; "
            "a projection's output (batch, tokens, 3 * width) takes qkv.view(batch, tokens, 3, heads, -1)"
        )
    if not qkv.is_floating_point():
        raise ValueError(f"causal_attention: qkv must hold floating-point numbers, got {qkv.dtype}")
    if rotary is None:
        return
    wanted = (qkv.shape[1], qkv.shape[4])
    if tuple(rotary.shape) != wanted or rotary.dtype != torch.float32 or wanted[1] % 2 != 0:
        raise ValueError(
            f"causal_attention: rotary must be float32 {wanted}, (tokens, head_dim) of an even head_dim, got "
            f"{rotary.dtype} {tuple(rotary.shape)}; rarefy.ops.rotary_table makes one"
        )


def _runs_kernel(qkv: Tensor) -> bool:
    return backend.runs_kernels(_why_not(qkv.dtype, qkv.device))


def _why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot run; None when it can."""
    if device.type != "cpu":
        return f"the compiled kernels run on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the attention kernel computes in float32, not {dtype}"
    return _no_library()


@torch.compiler.assume_constant_result  # the compiler need not see how a library is found
def _no_library() -> str | None:
    library = load()
    return library if isinstance(library, str) else None


def _forward(qkv: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check(qkv, rotary)
    return _kernel(qkv, rotary) if _runs_kernel(qkv) else _reference_with_lse(qkv, rotary)


def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, rotary: Tensor | None = None) -> Tensor:
    _check(qkv, rotary)
    if _runs_kernel(qkv):
        return _kernel_backward(dout, qkv, out, lse, rotary)
    return _reference_backward(dout, qkv, out, lse, rotary)


implement("causal_attention_backward", _backward)


# ---- kernel ----------------------------------------------------------------------------------------------------------


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernel reads: float16 is converted, in memory that is reused."""
    if tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.contiguous()
    return empty(1, tensor.numel()).view(tensor.shape).copy_(tensor)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernel(qkv: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, _, H, c = qkv.shape
    read, turns = _readable(qkv), None if rotary is None else rotary.contiguous()
    out, lse = empty(B * T, H * c, read.dtype).view(B, T, H, c), qkv.new_empty(B, H, T, dtype=torch.float32)
    pointers = (read.data_ptr(), _pointer(turns), out.data_ptr(), lse.data_ptr())
    call("rarefy_attention", *pointers, read.dtype == torch.bfloat16, B, T, H, c, torch.get_num_threads())
    return out.to(qkv.dtype), lse


def _kernel_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, rotary: Tensor | None) -> Tensor:
    B, T, _, H, c = qkv.shape
    dout, read, out = (_readable(tensor.to(qkv.dtype)) for tensor in (dout, qkv, out))
    lse, turns, dtype = lse.contiguous(), None if rotary is None else rotary.contiguous(), read.dtype
    dqkv = empty(B * T, 3 * H * c, dtype).view(qkv.shape)
    pointers = (dout.data_ptr(), read.data_ptr(), _pointer(turns), out.data_ptr(), lse.data_ptr(), dqkv.data_ptr())
    call("rarefy_attention_backward", *pointers, dtype == torch.bfloat16, B, T, H, c, torch.get_num_threads())
    return dqkv.to(qkv.dtype)


# ---- reference -------------------------------------------------------------------------------------------------------


def _log_probabilities(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, T) scores, minus infinity above the diagonal, and (B, H, T) their log-sum-exp."""
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    above = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=qkv.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(above, -math.inf)
    return scores, scores.logsumexp(dim=-1)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reference_with_lse(qkv: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    _, lse = _log_probabilities(_turned(qkv.to(_lse_dtype(qkv.dtype)), rotary))
    return reference(qkv, rotary).contiguous(), lse


def _reference_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, rotary: Tensor | None) -> Tensor:
    wide = _lse_dtype(qkv.dtype)
    turned = _turned(qkv.to(wide), rotary)
    q, k, v = turned.permute(2, 0, 3, 1, 4)
    dout, out = (tensor.to(wide).transpose(1, 2) for tensor in (dout, out))
    probabilities = (_log_probabilities(turned)[0] - lse[..., None]).exp()
    dscores = probabilities * (dout @ v.mT - (dout * out).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[3])
    gradients = torch.stack([dscores @ k, dscores.mT @ q, probabilities.mT @ dout]).permute(1, 3, 0, 2, 4)
    return _turned(gradients, None if rotary is None else _back(rotary)).to(qkv.dtype).contiguous()


def _back(rotary: Tensor) -> Tensor:
    """The table that turns the other way."""
    cosine, sine = rotary.split(rotary.shape[1] // 2, dim=1)
    return torch.cat([cosine, -sine], dim=1)


# ---- shapes and gradient ---------------------------------------------------------------------------------------------


@torch.library.register_fake("rarefy::causal_attention")
def _(qkv, rotary=None):
    _check(qkv, rotary)
    B, T, _, H, c = qkv.shape
    return qkv.new_empty(B, T, H, c), qkv.new_empty(B, H, T, dtype=_lse_dtype(qkv.dtype))


@torch.library.register_fake("rarefy::causal_attention_backward")
def _(dout, qkv, out, lse, rotary=None):
    _check(qkv, rotary)
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    out, lse = output
    qkv, rotary = inputs
    ctx.save_for_backward(qkv, out, lse, rotary)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout: Tensor | None, _):
    if dout is None:
        return None, None
    with torch.no_grad():
        dqkv = operators.causal_attention_backward(dout, *ctx.saved_tensors)
    return refuse_second_derivative("causal attention", dqkv)[0], None


implement("causal_attention", _forward, _gradient, _setup_context)
