"""The numeric core on one page: every op, its schema, shapes and gradient.

    B rows of input (tokens), I input features, O output features, b_r x b_c the block, R = O / b_r, C = I / b_c, K
    units.

    values  (K,) for 1 x 1 blocks, else (K, b_r, b_c)     crow (R + 1,)  cols (K,)        units by row
    block   [b_r, b_c]                                    t_crow (C + 1,)  t_rows (K,)  t_perm (K,)   the same by column

    spmm             y  = x W^T + bias                    (B, I) -> (B, O)
    spmm_t           dx = dy W                            (B, O) -> (B, I)
    sddmm            dW = dy^T x at the units only        (B, O), (B, I) -> values
    grow_candidates  the k absent units of largest mean |dy^T x|, best first, ties by lower unit; streamed, exact
    spmm_backward    spmm_t, sddmm and the bias gradient in one call, so that dy is packed once; feeds the growth sink

All cost O(nnz B) time and O(nnz + activations) memory, but `grow_candidates`, which costs a dense weight gradient's
time and O(k + tile) memory. W is (O, I) and exists nowhere. `spmm` returns x's dtype and accumulates in at least the
values'. The arrays of the index are plain tensors in the schema, so a rewire, which writes them in place, recompiles
nothing.

Each op has a specification (`reference`), a plain-torch fallback of bounded memory (`tiled`), CPU kernels (`native`)
and, for blocks that tensor cores like, GPU kernels (`triton`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.operator import operators

INDEX_ARGUMENTS = "Tensor crow, Tensor cols, Tensor t_crow, Tensor t_rows, Tensor t_perm, int[] block"
"""An `Index` in a schema."""

torch.library.define(
    "rarefy::spmm", f"(Tensor values, {INDEX_ARGUMENTS}, Tensor x, Tensor? bias=None, Tensor? sink=None) -> Tensor"
)
torch.library.define("rarefy::spmm_t", f"(Tensor values, {INDEX_ARGUMENTS}, Tensor dy) -> Tensor")
torch.library.define("rarefy::sddmm", f"({INDEX_ARGUMENTS}, Tensor dy, Tensor x) -> Tensor")
torch.library.define(
    "rarefy::grow_candidates", f"({INDEX_ARGUMENTS}, Tensor dy, Tensor x, int k) -> (Tensor units, Tensor scores)"
)
torch.library.define(
    "rarefy::spmm_backward",
    f"(Tensor values, {INDEX_ARGUMENTS}, Tensor dy, Tensor x, bool[] needs, Tensor(a!)? sink=None) "
    "-> (Tensor, Tensor, Tensor)",
)


def _out_features(crow: Tensor, block: list[int]) -> int:
    return (crow.shape[0] - 1) * block[0]


def _in_features(t_crow: Tensor, block: list[int]) -> int:
    return (t_crow.shape[0] - 1) * block[1]


def _check_x(op: str, x: Tensor, t_crow: Tensor, block: list[int]) -> None:
    torch._check(
        x.dim() == 2 and x.shape[1] == _in_features(t_crow, block),
        lambda: f"{op}: x must be (batch, in_features = {_in_features(t_crow, block)}), got {tuple(x.shape)}",
    )


def _check_dy(op: str, dy: Tensor, crow: Tensor, block: list[int]) -> None:
    torch._check(
        dy.dim() == 2 and dy.shape[1] == _out_features(crow, block),
        lambda: f"{op}: dy must be (batch, out_features = {_out_features(crow, block)}), got {tuple(dy.shape)}",
    )


def _values_shape(cols: Tensor, block: list[int]) -> tuple[int, ...]:
    return (cols.shape[0],) if list(block) == [1, 1] else (cols.shape[0], *block)


def check_spmm(crow: Tensor, t_crow: Tensor, block: list[int], x: Tensor) -> None:
    """Raises RuntimeError when x does not fit the matrix; every backend and the fake call it."""
    _check_x("spmm", x, t_crow, block)
    torch._check(x.is_floating_point(), lambda: f"spmm: x must hold floating-point numbers, got {x.dtype}")


def check_backward(op: str, crow: Tensor, t_crow: Tensor, block: list[int], dy: Tensor, x: Tensor | None) -> None:
    """Raises RuntimeError when dy or x do not fit the matrix or each other."""
    _check_dy(op, dy, crow, block)
    if x is not None:
        _check_x(op, x, t_crow, block)
        torch._check(x.shape[0] == dy.shape[0], lambda: f"{op}: dy has {dy.shape[0]} rows, x has {x.shape[0]}")


@torch.library.register_fake("rarefy::spmm")
def _(values, crow, cols, t_crow, t_rows, t_perm, block, x, bias=None, sink=None):
    check_spmm(crow, t_crow, block, x)
    return x.new_empty(x.shape[0], _out_features(crow, block))


@torch.library.register_fake("rarefy::spmm_t")
def _(values, crow, cols, t_crow, t_rows, t_perm, block, dy):
    check_backward("spmm_t", crow, t_crow, block, dy, None)
    return dy.new_empty(dy.shape[0], _in_features(t_crow, block))


@torch.library.register_fake("rarefy::sddmm")
def _(crow, cols, t_crow, t_rows, t_perm, block, dy, x):
    check_backward("sddmm", crow, t_crow, block, dy, x)
    return x.new_empty(_values_shape(cols, block))


@torch.library.register_fake("rarefy::grow_candidates")
def _(crow, cols, t_crow, t_rows, t_perm, block, dy, x, k):
    check_backward("grow_candidates", crow, t_crow, block, dy, x)
    absent = (crow.shape[0] - 1) * (t_crow.shape[0] - 1) - cols.shape[0]
    size = min(k, absent)
    return x.new_empty(size, dtype=torch.int64), x.new_empty(size, dtype=torch.float32)


@torch.library.register_fake("rarefy::spmm_backward")
def _(values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, needs, sink=None):
    check_backward("spmm_backward", crow, t_crow, block, dy, x)
    dx = dy.new_empty(dy.shape[0], _in_features(t_crow, block)) if needs[0] else dy.new_empty(0)
    dvalues = torch.empty_like(values) if needs[1] else values.new_empty(0)
    dbias = values.new_empty(_out_features(crow, block)) if needs[2] else values.new_empty(0)
    return dx, dvalues, dbias


def setup_context(ctx, inputs, output) -> None:
    """Keep what `backward` needs."""
    values, crow, cols, t_crow, t_rows, t_perm, block, x, bias, sink = inputs
    ctx.save_for_backward(values, crow, cols, t_crow, t_rows, t_perm, x)
    ctx.block = block
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Not saved as the rest are: the backward writes to it, and a layer may be used more than once in a forward.
    ctx.sink = sink


def refuse_second_derivative(op: str, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The gradients; under create_graph=True such that a second derivative raises and does not count as zero."""
    if not torch.is_grad_enabled():
        return gradients
    delayed_error = torch._C._functions.DelayedError  # pyright: ignore[reportAttributeAccessIssue]
    refuse = delayed_error(f"rarefy's {op} has no second derivative", len(gradients))
    refused = refuse(*(gradient.requires_grad_() for gradient in gradients))
    return (refused,) if isinstance(refused, Tensor) else refused


def backward(ctx, dy: Tensor):
    """Of `spmm`."""
    values, crow, cols, t_crow, t_rows, t_perm, x = ctx.saved_tensors
    needs = [ctx.needs_input_grad[7], ctx.needs_input_grad[0], ctx.bias_dtype is not None and ctx.needs_input_grad[8]]
    with torch.no_grad():
        gradients = operators.spmm_backward(
            values, crow, cols, t_crow, t_rows, t_perm, ctx.block, dy, x, needs, ctx.sink
        )
    dx, dvalues, dbias = refuse_second_derivative("spmm", *gradients)
    return (
        *(dvalues if needs[1] else None, None, None, None, None, None, None),
        *(dx if needs[0] else None, dbias.to(ctx.bias_dtype) if needs[2] else None, None),
    )
