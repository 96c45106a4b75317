"""The ops behind a sparse MLP: sparse matrices with an activation between them, as one call forward and one backward.

    mlp         z = x W_up^T + up_bias,                  y = act(z) W_down^T + down_bias         (B, I) -> (B, O)
    gated_mlp   the same, and g = x W_gate^T + gate_bias,  y = (act(g) * z) W_down^T + down_bias

with H hidden features. The second result is z for the backward pass, (ceil(B / 64), H, 64) of dtype `saved`: groups of
64 tokens, feature-major, which is how the kernels hold it; what stands at tokens past the last is undefined. Gated it
has 2 H features: g's, then z's. What follows from z is computed anew in backward. Cost as for one `spmm` a matrix;
memory B * H of `saved`, or 2 B * H, half of what layers and an activation keep one by one.

Where the kernels do not know dtype, device or block, or where growth looks on (`rarefy.ops.sink`), the same is composed
of `spmm`, the activation, and `spmm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.ops import native, reference, sink, tiled, triton
from rarefy.ops.backend import choose
from rarefy.ops.index import Index
from rarefy.ops.native import SAVED_TOKENS
from rarefy.ops.operator import implement, operators
from rarefy.ops.schema import check_backward, check_spmm, refuse_second_derivative

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "squared_relu")
"""In the order of csrc/rarefy.h."""

FUSED_TOKENS = 64
"""Below, the kernels for few tokens are faster one matrix at a time."""

MATRICES = {"mlp": ("up", "down"), "gated_mlp": ("gate", "up", "down")}
"""Of each op, in the order of its arguments."""

_WIDTH = 7  # arguments that make a matrix: values, and the fields of an Index

Matrices = Sequence[tuple[Tensor, Index]]
"""Values and index of each: those that read x, and at last the one that reads the hidden features."""


def _define(op: str, names: Sequence[str]) -> None:
    def each(text: str) -> str:
        return ", ".join(text.format(name) for name in names)

    matrices = each(
        "Tensor {0}_values, Tensor {0}_crow, Tensor {0}_cols, Tensor {0}_t_crow, Tensor {0}_t_rows, Tensor {0}_t_perm, "
        "int[] {0}_block"
    )
    torch.library.define(
        f"rarefy::{op}",
        f"({matrices}, Tensor x, {each('Tensor? {}_bias')}, str activation, ScalarType saved, "
        f"{each('Tensor? {}_sink=None')}) -> (Tensor, Tensor)",
    )
    sinks = ", ".join(f"Tensor({mark}!)? {name}_sink=None" for mark, name in zip("abc", names, strict=False))
    torch.library.define(
        f"rarefy::{op}_backward",
        f"({matrices}, Tensor dy, Tensor x, Tensor z, str activation, bool[] needs, {sinks}) -> "
        f"(Tensor, {each('Tensor, Tensor')})",
    )


def _split(arguments: Sequence, count: int) -> tuple[Matrices, list]:
    """The matrices, and the arguments that follow them."""
    matrices = []
    for at in range(0, count * _WIDTH, _WIDTH):
        values, *index, block = arguments[at : at + _WIDTH]
        matrices.append((values, Index._make([*index, list(block)])))
    return matrices, list(arguments[count * _WIDTH :])


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
    hidden = m[-1][1].in_features
    for _, index in m[:-1]:
        check_spmm(index.crow, index.t_crow, index.block, x)
        torch._check(
            index.out_features == hidden,
            lambda found=index.out_features: (
                f"mlp: a matrix that reads x has {found} outputs, the last one {hidden} inputs"
            ),
        )
    torch._check(activation in ACTIVATIONS, lambda: f"mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")


def _fake(count: int, arguments: Sequence) -> tuple[Tensor, Tensor]:
    m, (x, *rest) = _split(arguments, count)
    activation, saved = rest[count], rest[count + 1]
    _check(m, x, activation)
    groups = (x.shape[0] + SAVED_TOKENS - 1) // SAVED_TOKENS
    features = sum(index.out_features for _, index in m[:-1])
    z = x.new_empty(groups, features, SAVED_TOKENS, dtype=saved)
    return x.new_empty(x.shape[0], m[-1][1].out_features), z


def _fake_backward(count: int, arguments: Sequence) -> tuple[Tensor, ...]:
    m, (dy, x, _z, _activation, needs, *_) = _split(arguments, count)
    down = m[-1][1]
    check_backward("mlp", down.crow, down.t_crow, down.block, dy, None)
    results = [x.new_empty(x.shape)]
    for values, index in m:
        results += [torch.empty_like(values), values.new_empty(index.out_features)]
    return tuple(r if need else r.new_empty(0) for r, need in zip(results, needs, strict=True))


def _fused(m: Matrices, x: Tensor, saved: torch.dtype) -> ModuleType | None:
    """The kernels that take the whole MLP at once, if any do."""
    first, *others = (choose(values.dtype, values.device, index.block, index) for values, index in m)
    if any(other is not first for other in others):
        return None
    if first is native:
        fitting = {x.dtype, saved} <= {torch.float32, torch.bfloat16}
        fp32 = all(values.dtype == torch.float32 for values, _ in m)
        return native if fp32 and fitting and x.shape[0] >= FUSED_TOKENS else None
    squares = all(triton.is_square(index.block) for _, index in m)
    return first if first not in (reference, tiled) and squares else None


def _spmm(matrix: tuple[Tensor, Index], x: Tensor, bias: Tensor | None) -> Tensor:
    values, index = matrix
    return choose(values.dtype, x.device, index.block, index).spmm(values, index, x, bias)


def _forward(count: int, arguments: Sequence) -> tuple[Tensor, Tensor]:
    m, (x, *rest) = _split(arguments, count)
    biases, (activation, saved) = rest[:count], rest[count : count + 2]
    _check(m, x, activation)
    kernels = _fused(m, x, saved)
    if kernels is not None:
        return kernels.mlp(m, x, biases, ACTIVATIONS.index(activation), saved)
    z = torch.cat([pack(_spmm(*given), saved) for given in zip(m[:-1], [x] * count, biases, strict=False)], dim=1)
    first, *factors = unpack(z, x.shape[0]).to(x.dtype).chunk(count - 1, dim=1)
    h = activate(first, activation)
    for factor in factors:
        h = h * factor
    return _spmm(m[-1], h, biases[-1]), z


def _backward_op(count: int, arguments: Sequence) -> tuple[Tensor, ...]:
    m, (dy, x, z, activation, needs, *sinks) = _split(arguments, count)
    sinks += [None] * (count - len(sinks))  # torch leaves out defaults
    given = [each for each in sinks if each is not None]
    kernels = _fused(m, x, z.dtype)
    if kernels is not None and not any(map(sink.armed, given)):
        for each in given:
            sink.count(each)
        gradients = kernels.mlp_backward(m, dy, x, z, ACTIVATIONS.index(activation), needs)
    else:
        gradients = _composed_backward(m, dy, x, z, activation, needs, sinks)
    wanted = zip(gradients, needs, strict=True)
    return tuple(g if need and g is not None else x.new_empty(0) for g, need in wanted)


def _composed_backward(
    m: Matrices,
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    activation: str,
    needs: Sequence[bool],
    sinks: Sequence[Tensor | None],
) -> list[Tensor]:
    spmm_backward = operators.spmm_backward
    first, *factors = unpack(z, x.shape[0]).to(x.dtype).chunk(len(m) - 1, dim=1)
    act = activate(first, activation)
    h = act * factors[0] if factors else act
    values, index = m[-1]
    dh, *last = spmm_backward(values, *index, dy, h, [True, *needs[-2:]], sinks[-1])
    inner = [
        _activate_backward(dh * factors[0] if factors else dh, first, activation),
        *([dh * act] if factors else []),
    ]
    dx, gradients = None, []
    for at, ((values, index), dz) in enumerate(zip(m[:-1], inner, strict=True)):
        wanted = [needs[0], *needs[2 * at + 1 : 2 * at + 3]]
        part, *own = spmm_backward(values, *index, dz.contiguous(), x, wanted, sinks[at])
        dx = part if dx is None else dx + part
        gradients += own
    assert dx is not None
    return [dx, *gradients, *last]


def _setup_context(ctx, inputs, output, count: int) -> None:
    matrices, (x, *rest) = inputs[: count * _WIDTH], inputs[count * _WIDTH :]
    ctx.blocks = matrices[_WIDTH - 1 :: _WIDTH]
    ctx.save_for_backward(*(t for at, t in enumerate(matrices) if at % _WIDTH != _WIDTH - 1), x, output[1])
    ctx.biases = [None if bias is None else bias.dtype for bias in rest[:count]]
    ctx.activation = rest[count]
    ctx.sinks = rest[count + 2 :]  # not saved as the rest are: the backward writes to them
    ctx.set_materialize_grads(False)  # of z, which has none


def _backward(ctx, dy: Tensor | None, op: str, count: int):
    at_x = count * _WIDTH
    at_bias, num_inputs = at_x + 1, at_x + 1 + count + 2 + count
    results: list[Tensor | None] = [None] * num_inputs
    if dy is None:
        return tuple(results)
    *tensors, x, z = ctx.saved_tensors
    matrices = []
    for i, block in enumerate(ctx.blocks):
        matrices += [*tensors[i * (_WIDTH - 1) : (i + 1) * (_WIDTH - 1)], block]
    wants = [at_x]  # places of the inputs whose gradients the op returns, in its order
    for i in range(count):
        wants += [i * _WIDTH, at_bias + i]
    needs = [ctx.needs_input_grad[at] for at in wants]
    for i, dtype in enumerate(ctx.biases):
        needs[2 * i + 2] = needs[2 * i + 2] and dtype is not None
    with torch.no_grad():
        backward = getattr(operators, f"{op}_backward")
        gradients = backward(*matrices, dy, x, z, ctx.activation, needs, *ctx.sinks)
    gradients = refuse_second_derivative(op, *gradients)
    for at, need, gradient in zip(wants, needs, gradients, strict=True):
        if need:
            results[at] = gradient if at < at_bias else gradient.to(ctx.biases[at - at_bias])
    return tuple(results)


def _register(op: str, count: int) -> None:
    name = f"rarefy::{op}"
    torch.library.register_fake(name, lambda *arguments: _fake(count, arguments))
    torch.library.register_fake(f"{name}_backward", lambda *arguments: _fake_backward(count, arguments))
    implement(f"{op}_backward", lambda *arguments: _backward_op(count, arguments))
    implement(
        op,
        lambda *arguments: _forward(count, arguments),
        lambda ctx, dy, _dz: _backward(ctx, dy, op, count),
        lambda ctx, inputs, output: _setup_context(ctx, inputs, output, count),
    )


for _op, _names in MATRICES.items():
    _define(_op, _names)
    _register(_op, len(_names))
