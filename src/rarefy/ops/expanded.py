"""A layer that is nearly dense, computed by torch's dense matmul: values out to a weight for the call, gradient back.

    expanded           y = x W^T + bias               (B, I) -> (B, O)
    expanded_backward  dy W, dy^T x at the units, and the bias gradient; counts for and feeds the growth sink

W (O, I) is written from the values for the length of one call and never kept; a full pattern whose blocks are one row
high is the weight already, and nothing is copied. Time is that of the dense products, in x's dtype and the precision
that torch is set to, plus O(O * I) for writing and reading. Only the index by row is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops import sink as sinks
from rarefy.ops.index import Index
from rarefy.ops.schema import refuse_second_derivative
from rarefy.pattern import Pattern

_MATRIX = "Tensor crow, Tensor cols, int in_features, int[] block"

torch.library.define(
    "rarefy::expanded", f"(Tensor values, {_MATRIX}, Tensor x, Tensor? bias=None, Tensor? sink=None) -> Tensor"
)
torch.library.define(
    "rarefy::expanded_backward",
    f"(Tensor values, {_MATRIX}, Tensor dy, Tensor x, bool[] needs, Tensor(a!)? sink=None) -> (Tensor, Tensor, Tensor)",
)


def _out_features(crow: Tensor, block: list[int]) -> int:
    return (crow.shape[0] - 1) * block[0]


def _is_weight(values: Tensor, shape: tuple[int, int], block: list[int]) -> bool:
    """Whether the values in their own order are the dense weight."""
    return block[0] == 1 and values.numel() == shape[0] * shape[1]


def _units(crow: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) int64 unit row and unit column of each unit."""
    counts = torch.diff(crow)
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=crow.device), counts, output_size=cols.shape[0])
    return rows, cols.long()


def expand(values: Tensor, crow: Tensor, cols: Tensor, in_features: int, block: list[int]) -> Tensor:
    """(O, I) with `values` at the units and zeros elsewhere; the values themselves, seen so, where they are all."""
    shape = (_out_features(crow, block), in_features)
    if _is_weight(values, shape, block):
        return values.view(shape)
    rows, columns = _units(crow, cols)
    b_r, b_c = block
    weight = values.new_zeros(shape)
    if b_r == b_c == 1:
        weight.view(-1)[rows.mul_(in_features).add_(columns)] = values
    else:
        grid = weight.view(shape[0] // b_r, b_r, shape[1] // b_c, b_c).transpose(1, 2)
        grid[rows, columns] = values.view(-1, b_r, b_c)
    return weight


def collect(matrix: Tensor, values: Tensor, crow: Tensor, cols: Tensor, block: list[int]) -> Tensor:
    """The entries of a dense (O, I) matrix at the units, in the shape and dtype of `values`."""
    out, width = matrix.shape
    if _is_weight(values, (out, width), block):
        return matrix.to(values.dtype).view(values.shape)
    rows, columns = _units(crow, cols)
    b_r, b_c = block
    if b_r == b_c == 1:
        found = matrix.reshape(-1)[rows.mul_(width).add_(columns)]
    else:
        found = matrix.reshape(out // b_r, b_r, width // b_c, b_c).transpose(1, 2)[rows, columns]
    return found.to(values.dtype).reshape(values.shape)


def _check(op: str, width: int, name: str, given: Tensor) -> None:
    torch._check(
        given.dim() == 2 and given.shape[1] == width,
        lambda: f"{op}: {name} must be (batch, {width}), got {tuple(given.shape)}",
    )
    torch._check(given.is_floating_point(), lambda: f"{op}: {name} must hold floating-point numbers, got {given.dtype}")


def _check_backward(crow: Tensor, in_features: int, block: list[int], dy: Tensor, x: Tensor) -> None:
    _check("expanded_backward", _out_features(crow, block), "dy", dy)
    _check("expanded_backward", in_features, "x", x)
    torch._check(x.shape[0] == dy.shape[0], lambda: f"expanded_backward: dy has {dy.shape[0]} rows, x {x.shape[0]}")


def _expanded(values, crow, cols, in_features, block, x, bias=None, sink=None) -> Tensor:
    _check("expanded", in_features, "x", x)
    weight = expand(values.to(x.dtype), crow, cols, in_features, list(block))
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)


def _expanded_backward(values, crow, cols, in_features, block, dy, x, needs, sink=None):
    _check_backward(crow, in_features, block, dy, x)
    block = list(block)
    dx, dvalues, dbias = dy.new_empty(0), values.new_empty(0), values.new_empty(0)
    if needs[0]:
        dx = dy @ expand(values.to(dy.dtype), crow, cols, in_features, block)
    if needs[1]:
        dvalues = collect(dy.T @ x, values, crow, cols, block)
    if needs[2]:
        dbias = dy.sum(dim=0, dtype=values.dtype)
    if sink is not None:
        if sinks.armed(sink):  # growth alone asks for the index by column: it is made for this one step
            pattern = Pattern(crow, cols.int(), (_out_features(crow, block), in_features), (block[0], block[1]))
            sinks.feed(sink, Index.of(pattern), dy, x)
        else:
            sinks.count(sink)
    return dx, dvalues, dbias


@torch.library.register_fake("rarefy::expanded")
def _(values, crow, cols, in_features, block, x, bias=None, sink=None):
    _check("expanded", in_features, "x", x)
    return x.new_empty(x.shape[0], _out_features(crow, block))


@torch.library.register_fake("rarefy::expanded_backward")
def _(values, crow, cols, in_features, block, dy, x, needs, sink=None):
    _check_backward(crow, in_features, block, dy, x)
    dx = dy.new_empty(dy.shape[0], in_features) if needs[0] else dy.new_empty(0)
    dvalues = torch.empty_like(values) if needs[1] else values.new_empty(0)
    dbias = values.new_empty(_out_features(crow, block)) if needs[2] else values.new_empty(0)
    return dx, dvalues, dbias


def _setup_context(ctx, inputs, output) -> None:
    values, crow, cols, in_features, block, x, bias, sink = inputs
    ctx.save_for_backward(values, crow, cols, x)
    ctx.in_features, ctx.block = in_features, block
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.sink = sink  # not saved as the rest are: the backward writes to it


def _backward(ctx, dy: Tensor):
    values, crow, cols, x = ctx.saved_tensors
    needs = [ctx.needs_input_grad[5], ctx.needs_input_grad[0], ctx.bias_dtype is not None and ctx.needs_input_grad[6]]
    with torch.no_grad():
        gradients = torch.ops.rarefy.expanded_backward(
            values, crow, cols, ctx.in_features, ctx.block, dy, x, needs, ctx.sink
        )
    dx, dvalues, dbias = refuse_second_derivative("expanded", *gradients)
    return (
        *(dvalues if needs[1] else None, None, None, None, None),
        *(dx if needs[0] else None, dbias.to(ctx.bias_dtype) if needs[2] else None, None),
    )


torch.library.register_autograd("rarefy::expanded", _backward, setup_context=_setup_context)
torch.library.impl("rarefy::expanded", "CompositeExplicitAutograd", _expanded)
torch.library.impl("rarefy::expanded_backward", "CompositeExplicitAutograd", _expanded_backward)
