"""MLPs as one op, gated and not: against dense float64 with derived tolerances, and what fusing must not change."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlp_cases import HIDDEN, IN, OUT, Problem, problem, with_bf16_values
from near import dense_activation
from rarefy import Constant, Pattern, Plan, RigL, SparseLinear, sparsify
from rarefy.growth import Request
from rarefy.growth.exact import DenseGradient
from rarefy.models import GPT, GPTConfig
from rarefy.nn import gated_mlp, mlp
from rarefy.ops import Index, available, sink, using
from rarefy.ops.mlp import ACTIVATIONS, pack, unpack
from rarefy.rewiring import ranks

OPS = torch.ops.rarefy

shared = functools.cache(problem)
"""The same for tests that change nothing: every backend is held to the same truth."""


@pytest.fixture(params=available())
def backend(request: pytest.FixtureRequest):
    with using(request.param):
        yield request.param


GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
STORAGE = pytest.mark.parametrize(
    "rows, saved",
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "medium", "bf16"],
)

# -- against the dense truth ------------------------------------------------------------------------------------------


@GATED
@STORAGE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_matches_dense(backend, gated, rows, saved, activation):
    shared(65, gated=gated, dtype=rows).check(activation, saved)


@GATED
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("batch", [1, 63, 64, 65, 200])
def test_every_batch_matches_dense(backend, gated, batch, bias):
    shared(batch, gated=gated, bias=bias).check("gelu")
    shared(batch, gated=gated, bias=bias, dtype=torch.bfloat16).check("silu")


BLOCKS = [((1, 1), (4, 4)), ((8, 1), (1, 1)), ((4, 1), (8, 8)), ((16, 16), (8, 1)), ((4, 4), (16, 16))]


@GATED
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_mixed_blocks_match_dense(backend, gated, blocks):
    shared(130, gated=gated, blocks=blocks).check("silu")


@GATED
@pytest.mark.parametrize("block", [(8, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("batch", [64, 65, 200, 400])
def test_large_blocks_in_bf16_match_dense(backend, gated, block, batch):
    for activation in ("gelu", "silu"):
        with_bf16_values(batch, block, gated).check(activation)


@GATED
@pytest.mark.parametrize("block", [(8, 8), (16, 16)], ids=str)
def test_large_blocks_under_medium_match_dense(backend, gated, block):
    """fp32 rows, and no more rounding inside than with bf16 rows."""
    p = with_bf16_values(200, block, gated)
    wide = dataclasses.replace(p, x=p.x.float(), dy=p.dy.float())
    y, z = wide.forward("gelu", torch.bfloat16)
    assert y.dtype == torch.float32 and z.dtype == torch.bfloat16
    for exact, found in zip(p.exact("gelu", torch.bfloat16), (y, *wide.backward(z, "gelu")), strict=True):
        exact.admits(found)


@GATED
@pytest.mark.parametrize("block", [((2, 3), (1, 1)), ((1, 1), (2, 2))], ids=str)
def test_blocks_without_a_kernel_are_composed(gated, block):
    """A matrix alone may still have one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plain torch being slower
        shared(70, gated=gated, blocks=block, sizes=(24, 36, 12)).check("gelu")


@GATED
@pytest.mark.parametrize(
    "sizes, density", [((300, 1100, 700), 0.05), ((1500, 90, 400), 0.1), ((7, 5, 3), 1.0), ((1, 1, 1), 1.0)]
)
def test_many_chunks_and_tiles_match_dense(gated, sizes, density):
    shared(300, gated=gated, sizes=sizes, density=density).check("gelu")


@GATED
def test_an_empty_batch(backend, gated):
    p = problem(0, gated=gated)
    y, z = p.forward("gelu")
    assert y.shape == (0, OUT) and z.shape[0] == 0
    dx, *gradients = p.backward(z, "gelu")
    assert dx.shape == p.x.shape and not any(gradient.any() for gradient in gradients)


@GATED
def test_only_wanted_gradients_are_given(backend, gated):
    p = problem(65, gated=gated)
    _, z = p.forward("gelu")
    whole = p.backward(z, "gelu")
    for place in range(len(whole)):
        needs = [at == place for at in range(len(whole))]
        part = p.backward(z, "gelu", needs)
        torch.testing.assert_close(part[place], whole[place], rtol=1e-5, atol=1e-5)
        assert all(gradient.numel() == 0 for at, gradient in enumerate(part) if at != place)


@GATED
@STORAGE
def test_the_same_bits_from_run_to_run_and_whatever_the_threads(backend, gated, rows, saved):
    p = problem(200, gated=gated, dtype=rows, sizes=(96, 700, 64))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            if count > 1 and backend in ("reference", "tiled"):
                continue  # dense matmuls of torch, which may add in another order
            torch.set_num_threads(count)
            y, z = p.forward("silu", saved)
            runs.append((y, unpack(z, 200), *p.backward(z, "silu")))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


@GATED
@pytest.mark.parametrize("block", [(8, 8), (16, 16)], ids=str)
def test_large_blocks_in_bf16_give_the_same_bits_whatever_the_threads_and_without_dx(backend, gated, block):
    p = problem(200, gated=gated, blocks=(block, block), sizes=(96, 704, 64), dtype=torch.bfloat16)
    needs = [False] + [True] * (2 * len(p.values))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            if count > 1 and backend in ("reference", "tiled"):
                continue  # dense matmuls of torch, which may add in another order
            torch.set_num_threads(count)
            y, z = p.forward("silu", torch.bfloat16)
            whole, part = p.backward(z, "silu"), p.backward(z, "silu", needs)
            assert part[0].numel() == 0
            assert all(torch.equal(a, b) for a, b in zip(whole[1:], part[1:], strict=True))
            runs.append((y, unpack(z, 200), *whole))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


def test_what_is_kept_is_in_groups_of_64_tokens():
    z = torch.arange(130.0 * 3).view(130, 3)
    packed = pack(z, torch.float32)
    assert packed.shape == (3, 3, 64) and torch.equal(packed[1, 2], z[64:128, 2])
    assert torch.equal(unpack(packed, 130), z)


@GATED
def test_padding_tokens_stay_out_of_the_gradient(gated):
    """A gradient that is not finite in the last of 65 tokens reaches only what it must."""
    p = problem(65, gated=gated)
    p.dy[-1, 4] = torch.inf
    _, z = p.forward("gelu")
    row = p.patterns[-1].row_indices()
    assert torch.equal(~p.backward(z, "gelu")[-2].isfinite(), row == 4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", available()[2:])
def test_activations_at_the_ends(name, activation):
    """Very large, very small and infinite inputs of the activation, through an identity."""
    size = 64
    eye = Pattern.from_mask(torch.eye(size, dtype=torch.bool))
    z = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 90.0, -90.0, 1e4, -1e4, 1e18, -1e18, torch.nan]
    )
    x = z.repeat(5)[:size].expand(size, size).contiguous()
    ones = torch.ones(size)
    with using(name):
        y, saved = OPS.mlp(ones, *Index.of(eye), ones, *Index.of(eye), x, None, None, activation, torch.float32)
        dx, *_ = OPS.mlp_backward(
            *(ones, *Index.of(eye), ones, *Index.of(eye)), torch.ones_like(x), x, saved, activation, [True] * 5
        )
    at = x.double().requires_grad_()
    exact = dense_activation(at, activation)
    (slope,) = torch.autograd.grad(exact.sum(), at)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-5, atol=2e-6, equal_nan=True)


# -- as an operator of torch ------------------------------------------------------------------------------------------


def leaves(p: Problem) -> list[Tensor]:
    return [t.requires_grad_() for t in (p.x, *p.values, *p.biases) if t is not None]


def small(gated: bool, dtype: torch.dtype, batch: int = 3) -> Problem:
    return problem(batch, gated=gated, sizes=(4, 6, 3), density=0.5, dtype=dtype, values_dtype=dtype)


@GATED
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fallback", ["reference", "tiled"])
def test_gradcheck(gated, activation, fallback):
    p = small(gated, torch.float64)
    count = len(p.values)

    def run(x: Tensor, *given: Tensor) -> Tensor:
        values, biases = given[:count], given[count:]
        return Problem(p.patterns, list(values), list(biases), x, p.dy).forward(activation)[0]

    with using(fallback):
        assert torch.autograd.gradcheck(run, leaves(p))


@GATED
@pytest.mark.parametrize("batch", [3, 70])
def test_opcheck(gated, batch):
    p = small(gated, torch.float32, batch)
    sinks = [torch.zeros(2, dtype=torch.int64) for _ in p.values]
    _, z = p.forward("gelu")
    z = pack(unpack(z, batch), z.dtype)  # what is undefined would differ from run to run
    backward = getattr(OPS, f"{p.op}_backward").default
    some = [at % 2 == 0 for at in range(1 + 2 * len(p.values))]
    for needs in ([True] * len(some), some):
        torch.library.opcheck(backward, (*p.matrices, p.dy, p.x, z, "gelu", needs, *sinks))
    leaves(p)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = getattr(OPS, p.op).default
    kept = tests if batch % 64 == 0 or batch < 64 else tests[:3]  # z's undefined tokens are compared in the last
    torch.library.opcheck(forward, (*p.matrices, p.x, *p.biases, "gelu", torch.float32, *sinks), test_utils=kept)


@GATED
def test_no_second_derivative_is_an_error_and_not_zero(gated):
    p = small(gated, torch.float32)
    x = leaves(p)[0]
    (dx,) = torch.autograd.grad(p.forward("gelu")[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (dx.pow(2).sum() + p.values[0].sum()).backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 5)}, r"x must be \(batch, in_features = 4\), got \(3, 5\)"),
        ({"patterns": "swapped"}, "a matrix that reads x has 3 outputs, the last one 4 inputs|x must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    p = small(False, torch.float32)
    if "x" in change:
        p = Problem(p.patterns, p.values, p.biases, change["x"], p.dy)
    else:
        p = Problem(p.patterns[::-1], p.values[::-1], p.biases[::-1], p.x, p.dy)
    with pytest.raises(RuntimeError, match=message):
        p.forward("gelu")


def test_an_unknown_activation_is_named():
    with pytest.raises(RuntimeError, match=r"activation must be one of .* got 'tanh'"):
        small(False, torch.float32).forward("tanh")


# -- modules ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A sparse MLP, fused or layer by layer."""

    def __init__(self, gated: bool = False, *, fused: bool = True, bias: bool = True, sizes=(IN, HIDDEN, OUT)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        features, hidden, out = sizes
        self.up = SparseLinear(features, hidden, bias, density=0.3, generator=generator)
        self.down = SparseLinear(hidden, out, bias, density=0.3, generator=generator)
        self.gate = SparseLinear(features, hidden, bias, density=0.3, generator=generator) if gated else None
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            if self.gate is None:
                return mlp(x, self.up, "gelu", self.down)
            return gated_mlp(x, self.gate, self.up, "silu", self.down)
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().pow(2).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        scale = theirs[name].double().abs().max().item()
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=tolerance * scale, msg=name)


@GATED
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_module_is_its_layers(gated, bias):
    x = torch.randn(3, 50, IN)
    fused, apart = Block(gated, bias=bias), Block(gated, bias=bias, fused=False)
    assert_same(gradients(fused, x), gradients(apart, x), 1e-5)
    assert fused(x).shape == (3, 50, OUT) and fused(x[0, 0]).shape == (OUT,)


@GATED
def test_autocast(gated):
    """Activations in bf16, values' gradients in fp32, as of layers one by one."""
    x = torch.randn(100, IN)
    fused, apart = Block(gated), Block(gated, fused=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16
        mine, theirs = gradients(fused, x), gradients(apart, x)
    assert mine["up.values"].dtype == torch.float32 and mine["x"].dtype == torch.float32
    assert_same(mine, theirs, 0.02)


@GATED
def test_frozen_parameters_get_no_gradient(gated):
    x = torch.randn(70, IN)
    whole = gradients(Block(gated), x)
    for frozen in ("up.values", "down.values", "up.bias", "down.bias"):
        model = Block(gated)
        model.get_parameter(frozen).requires_grad_(False)
        found = gradients(model, x)
        assert frozen not in found and set(found) == set(whole) - {frozen}
        assert_same(found, {name: whole[name] for name in found}, 1e-5)


@GATED
def test_nothing_is_kept_without_gradients(gated):
    with torch.no_grad():
        assert not Block(gated)(torch.randn(70, IN)).requires_grad


@pytest.mark.parametrize("which", ["up", "down"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "all modules"])
def test_hooks_run(which, kind):
    """A layer with a hook is called as itself, and the result is the same."""
    model, x, seen = Block(), torch.randn(70, IN), []
    plain = model(x)
    layer = model.get_submodule(which)
    if kind == "forward":
        handle = layer.register_forward_hook(lambda module, *_: seen.append(module))
    elif kind == "pre":
        handle = layer.register_forward_pre_hook(lambda module, _: seen.append(module))
    elif kind == "backward":
        handle = layer.register_full_backward_hook(lambda module, *_: seen.append(module))
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    y = model(x.requires_grad_())
    y.sum().backward()
    handle.remove()
    assert layer in seen
    torch.testing.assert_close(y, plain)
    seen.clear()
    model(x)
    assert not seen


@GATED
def test_copies_and_state_dicts(gated):
    model, x = Block(gated), torch.randn(70, IN)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    names = ["up", "down", *(["gate"] if gated else [])]
    arrays = ("values", "bias", "crow_indices", "col_indices")
    assert set(model.state_dict()) == {f"{name}.{array}" for name in names for array in arrays}


class Saved:
    """Bytes that autograd keeps of a forward pass, parameters and indices apart."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}

    def bytes(self, model: nn.Module, x: Tensor) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in self.known | {x.data_ptr()}:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        return sum(kept.values())


@GATED
def test_what_is_kept_for_the_backward_pass(gated):
    """The activation's inputs and no more: half of what the layers keep; under "medium" half of that again."""
    x = torch.randn(128, IN, requires_grad=True)
    fused, apart = Block(gated), Block(gated, fused=False)
    whole = 128 * HIDDEN * 4 * (2 if gated else 1)
    assert Saved(fused).bytes(fused, x) == whole
    assert Saved(apart).bytes(apart, x) == 2 * whole
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Saved(fused).bytes(fused, x) == whole / 2
        y = fused(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, apart(x), rtol=0.02, atol=0.02)
    assert not torch.equal(y, fused(x))


@GATED
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_compiles_to_one_graph(gated, precision):
    x, model = torch.randn(70, IN), Block(gated)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(
            gradients(compiled, x),
            {f"_orig_mod.{n}" if "." in n else n: g for n, g in gradients(model, x).items()},
            1e-5,
        )
    finally:
        torch.set_float32_matmul_precision(before)
        torch._dynamo.reset()


# -- growth -----------------------------------------------------------------------------------------------------------


def request(name: str, layer: SparseLinear) -> Request:
    return Request(name=name, step=1, seed=0, values=layer.values, k=1, returns=False, calls=None, ranks=ranks)


@GATED
@pytest.mark.parametrize("autocast", [False, True])
def test_an_armed_collector_sees_what_it_sees_of_layers(gated, autocast):
    x, found = torch.randn(100, IN), {}
    for fused in (True, False):
        model = Block(gated, fused=fused)
        layers = {name: layer for name, layer in model.named_children() if isinstance(layer, SparseLinear)}
        collectors = {name: DenseGradient(request(name, layer)) for name, layer in layers.items()}
        for name, layer in layers.items():
            sink.arm(layer.sink, collectors[name])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gradients(model, x)
        assert all(sink.take_calls(layer.sink) == 1 for layer in layers.values())
        found[fused] = {name: collector.gradient for name, collector in collectors.items()}
        for layer in layers.values():
            sink.disarm(layer.sink)
        gradients(model, x)
        assert all(sink.take_calls(layer.sink) == 1 for layer in layers.values())  # counted when no one waits, too
    assert_same(found[True], found[False], 0.02 if autocast else 1e-5)


def train_gpt(fused: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[Any]]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, layers=2, heads=4, context=16), torch.Generator().manual_seed(1))
    rewirer = sparsify(model, Plan(density=0.3, keep_dense=("head",), method=RigL(interval=3, fraction=Constant(0.3))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # small: no chaos that lets rounding grow
    rewirer.attach(optimizer, total_steps=24)
    tokens = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(2))
    losses = []
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(sys.modules["rarefy.nn.mlp"], "is_plain", lambda layer: False)
        for _ in range(24):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    patterns = [layer.pattern for layer in rewirer.layers.values()]
    assert len(rewirer.history) > 8
    return losses, patterns


def test_a_gpt_rewires_and_learns_as_layer_by_layer(monkeypatch):
    (mine, my_patterns), (theirs, their_patterns) = (train_gpt(fused, monkeypatch) for fused in (True, False))
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=0)
    assert mine[-1] < mine[0]
    for a, b in zip(my_patterns, their_patterns, strict=True):  # a tie within rounding may fall either way
        both = set(a.unit_indices().tolist()) & set(b.unit_indices().tolist())
        assert len(both) >= 0.99 * a.num_units


def test_a_gpt_compiles_to_one_graph():
    model = GPT(GPTConfig(width=32, layers=1, heads=4, context=64))
    sparsify(model, Plan(density=0.3, keep_dense=("head",)))
    tokens = torch.randint(256, (2, 64))
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens), model(tokens))
        compiled(tokens).sum().backward()
    finally:
        torch._dynamo.reset()
