"""Causal attention on the output of a fused projection: schema, gradient, reference and the CPU kernel, on one page.

    B sequences, T tokens, H heads, c features a head.

    qkv   (B, T, 3, H, c)   query, key and value of each token, as nn.Linear(C, 3 C) writes them
    out   (B, T, H, c)      as nn.Linear(C, C) reads it
    lse   (B, H, T)         logarithm of each softmax's denominator, for the backward pass

    causal_attention            out of token t = the mean of the values up to t, weighted by softmax(q k^T / sqrt(c))
    causal_attention_backward   dqkv from dout

The kernel (csrc/attention.h) computes what lies below the diagonal only and copies nothing: T^2 c H B multiplications
forward and 2.5 times as many backward, O(T c) scratch a thread. Its bits do not depend on the number of threads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.ops import backend
from rarefy.ops.library import call, load
from rarefy.ops.memory import empty
from rarefy.ops.schema import refuse_second_derivative

torch.library.define("rarefy::causal_attention", "(Tensor qkv) -> (Tensor out, Tensor lse)")
torch.library.define("rarefy::causal_attention_backward", "(Tensor dout, Tensor qkv, Tensor out, Tensor lse) -> Tensor")


def causal_attention(qkv: Tensor) -> Tensor:
    """(B, T, 3, H, c) -> (B, T, H, c), by the kernel where there is one for the dtype and device, else by torch's.

    Raises:
        ValueError: qkv has another shape or no floating-point numbers, or a backend was named (`rarefy.ops.using`) that
            cannot.
    """
    _check(qkv)
    return torch.ops.rarefy.causal_attention(qkv)[0] if _runs_kernel(qkv) else reference(qkv)


def reference(qkv: Tensor) -> Tensor:
    """The specification, and what runs without the kernel: any device and dtype, differentiable as torch's own is."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _check(qkv: Tensor) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(
            f"causal_attention: qkv must be (batch, tokens, 3, heads, head_dim), got {tuple(qkv.shape)}; "
            "a projection's output (batch, tokens, 3 * width) takes qkv.view(batch, tokens, 3, heads, -1)"
        )
    if not qkv.is_floating_point():
        raise ValueError(f"causal_attention: qkv must hold floating-point numbers, got {qkv.dtype}")


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


def _forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    _check(qkv)
    return _kernel(qkv) if _runs_kernel(qkv) else _reference_with_lse(qkv)


def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    _check(qkv)
    if _runs_kernel(qkv):
        return _kernel_backward(dout, qkv, out, lse)
    return _reference_backward(dout, qkv, out, lse)


for _name, _function in (("causal_attention", _forward), ("causal_attention_backward", _backward)):
    torch.library.impl(f"rarefy::{_name}", "CompositeExplicitAutograd", _function)


# ---- kernel ----------------------------------------------------------------------------------------------------------


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernel reads: float16 is converted, in memory that is reused."""
    if tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.contiguous()
    return empty(1, tensor.numel()).view(tensor.shape).copy_(tensor)


def _kernel(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, c = qkv.shape
    read = _readable(qkv)
    out, lse = empty(B * T, H * c, read.dtype).view(B, T, H, c), qkv.new_empty(B, H, T, dtype=torch.float32)
    pointers = (read.data_ptr(), out.data_ptr(), lse.data_ptr())
    call("rarefy_attention", *pointers, read.dtype == torch.bfloat16, B, T, H, c, torch.get_num_threads())
    return out.to(qkv.dtype), lse


def _kernel_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    B, T, _, H, c = qkv.shape
    inputs = [_readable(tensor.to(qkv.dtype)) for tensor in (dout, qkv, out)]
    dtype = inputs[1].dtype
    dqkv = empty(B * T, 3 * H * c, dtype).view(qkv.shape)
    pointers = (*(tensor.data_ptr() for tensor in inputs), lse.contiguous().data_ptr(), dqkv.data_ptr())
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


def _reference_with_lse(qkv: Tensor) -> tuple[Tensor, Tensor]:
    _, lse = _log_probabilities(qkv.to(_lse_dtype(qkv.dtype)))
    return reference(qkv).contiguous(), lse


def _reference_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    wide = _lse_dtype(qkv.dtype)
    q, k, v = qkv.to(wide).permute(2, 0, 3, 1, 4)
    dout, out = (tensor.to(wide).transpose(1, 2) for tensor in (dout, out))
    probabilities = (_log_probabilities(qkv.to(wide))[0] - lse[..., None]).exp()
    dscores = probabilities * (dout @ v.mT - (dout * out).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[3])
    gradients = torch.stack([dscores @ k, dscores.mT @ q, probabilities.mT @ dout])
    return gradients.permute(1, 3, 0, 2, 4).to(qkv.dtype).contiguous()


# ---- shapes and gradient ---------------------------------------------------------------------------------------------


@torch.library.register_fake("rarefy::causal_attention")
def _(qkv):
    _check(qkv)
    B, T, _, H, c = qkv.shape
    return qkv.new_empty(B, T, H, c), qkv.new_empty(B, H, T, dtype=_lse_dtype(qkv.dtype))


@torch.library.register_fake("rarefy::causal_attention_backward")
def _(dout, qkv, out, lse):
    _check(qkv)
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    out, lse = output
    ctx.save_for_backward(*inputs, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout: Tensor | None, _):
    if dout is None:
        return None
    qkv, out, lse = ctx.saved_tensors
    with torch.no_grad():
        dqkv = torch.ops.rarefy.causal_attention_backward(dout, qkv, out, lse)
    return refuse_second_derivative("causal attention", dqkv)[0]


torch.library.register_autograd("rarefy::causal_attention", _gradient, setup_context=_setup_context)
