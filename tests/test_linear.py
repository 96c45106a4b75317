"""SparseLinear as a module: what it computes, copies, saves, loads and refuses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cases import scatter
from rarefy import Pattern, SparseLinear
from rarefy.ops import sink as sinks

BLOCKS = [(1, 1), (4, 4), (4, 1), (2, 3)]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=BLOCKS, ids=str)
def block(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def make(block: tuple[int, int] = (1, 1), seed: int = 0, **options) -> SparseLinear:
    """24 inputs, 12 outputs, a third of the units."""
    generator = torch.Generator().manual_seed(seed)
    return SparseLinear(24, 12, density=1 / 3, block=block, generator=generator, **options)


def check_consistent(layer: SparseLinear) -> None:
    """The derived indices are those of the pattern."""
    pattern = layer.pattern
    for mine, theirs in zip((layer.t_crow, layer.t_rows, layer.t_perm), pattern.transposed(), strict=True):
        assert torch.equal(mine.int(), theirs)


# -- what it computes --


def test_computes_what_its_dense_twin_does(block):
    layer, x = make(block), torch.randn(5, 7, 24, requires_grad=True)
    dense, x_too = layer.to_dense(), x.detach().clone().requires_grad_()
    dy = torch.randn(5, 7, 12)
    layer(x).backward(dy)
    dense(x_too).backward(dy)
    assert layer.values.grad is not None and layer.bias is not None and x.grad is not None
    torch.testing.assert_close(layer(x), dense(x_too))
    torch.testing.assert_close(x.grad, x_too.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert dense.weight.grad is not None
    torch.testing.assert_close(scatter(layer.values.grad, layer.pattern), dense.weight.grad * layer.pattern.to_mask())


@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (0, 24), (2, 3, 24), (2, 0, 24), (1, 1, 1, 24)])
def test_takes_any_leading_shape(block, shape):
    layer, x = make(block), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 12)
    torch.testing.assert_close(y, layer.to_dense()(x))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert layer.values.grad is not None and torch.isfinite(layer.values.grad).all()


def test_a_layer_without_inputs_gives_its_bias():
    layer = SparseLinear(0, 3, density=0.5)
    assert layer.num_units == 0 and layer.density == 0
    assert torch.equal(layer(torch.randn(2, 0)), layer.bias.detach().expand(2, 3))  # type: ignore[union-attr]


def test_a_layer_without_units_still_trains_its_bias():
    layer = SparseLinear.from_pattern(Pattern.with_units((3, 4), 0))
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.bias is not None and layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [2, 2, 2] and layer.values.grad is not None and layer.values.grad.shape == (0,)


def test_used_twice_in_one_forward(block):
    """Both uses count in the gradient, as they do for a dense layer."""
    layer = SparseLinear(12, 12, density=0.3, block=block if 12 % block[1] == 0 else 1)
    dense, x = layer.to_dense(), torch.randn(5, 12)
    layer(layer(x).relu()).pow(2).sum().backward()
    dense(dense(x).relu()).pow(2).sum().backward()
    assert layer.values.grad is not None and dense.weight.grad is not None
    torch.testing.assert_close(
        scatter(layer.values.grad, layer.pattern),
        dense.weight.grad * layer.pattern.to_mask(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    layer, x = make(), torch.randn(5, 24, requires_grad=True)
    layer(x).pow(2).sum().backward()
    assert layer.values.grad is not None
    wanted, layer.values.grad = layer.values.grad.clone(), None
    y = checkpoint(layer, x, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.pow(2).sum().backward()
    assert torch.equal(layer.values.grad, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", ["values", "bias", "x"])
def test_gives_no_gradient_where_none_is_wanted(frozen):
    layer, x = make(), torch.randn(5, 24, requires_grad=frozen != "x")
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    layer(x).sum().backward()
    tensors: dict[str, Tensor] = {"values": layer.values, "bias": layer.bias, "x": x}  # type: ignore[dict-item]
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_functional_call(block):
    """Parameters as arguments, gradients to them. (torch.func.grad refuses every op of torch.library, so this one.)"""
    layer, x = make(block), torch.randn(5, 24)
    layer(x).pow(2).sum().backward()
    given = {name: (p.detach() * 2).requires_grad_() for name, p in layer.named_parameters()}
    y = functional_call(layer, given, (x,))
    torch.testing.assert_close(y, 2 * layer(x).detach())
    y.pow(2).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(given[name].grad, 2 * p.grad)


def test_autocast_casts_activations_and_nothing_else(block):
    """bf16 in and out, fp32 values, and a gradient that was summed in fp32: not rounded to bf16 on the way."""
    layer, x = make(block), torch.randn(300, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert layer(x.double()).dtype == torch.float64
    y.sum().backward()
    assert layer.values.grad is not None and layer.values.grad.dtype == torch.float32
    rounded = x.bfloat16().double()
    exact = torch.ones(12, 300, dtype=torch.float64) @ rounded
    found = scatter(layer.values.grad.double(), layer.pattern)
    bound = 302 * EPS * (torch.ones(12, 300, dtype=torch.float64) @ rounded.abs())
    assert ((found - exact * layer.pattern.to_mask()).abs() <= bound).all()
    assert not torch.equal(layer.values.grad.bfloat16().float(), layer.values.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_dtype_converts_values_and_keeps_indices(block, dtype):
    layer = make(block)
    before = layer.pattern
    layer.to(dtype)
    assert layer.values.dtype == layer.bias.dtype == dtype  # type: ignore[union-attr]
    assert layer.pattern == before and layer.crow_indices.dtype == torch.int32
    x = torch.randn(6, 24, dtype=dtype)
    y, wanted = layer(x), layer.double().to_dense()(x.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.02)


def test_half_and_double_are_to():
    assert make().half().values.dtype == torch.float16
    assert make().double().values.dtype == torch.float64


# -- what it is --


def test_only_values_and_bias_train(block):
    layer = make(block)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert layer.values.numel() == layer.pattern.nnz == round(12 * 24 / 3)
    assert layer.values.shape == ((96,) if block == (1, 1) else (96 // (block[0] * block[1]), *block))
    assert layer.density == pytest.approx(1 / 3) and layer.num_units == layer.pattern.num_units


def test_holds_nothing_of_the_dense_size():
    layer = SparseLinear(2000, 2000, density=0.01)
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert held < 40_000 * (4 + 2 + 2 + 4) + 4 * 2 * 2001 + 4 * 2000 + 100
    assert layer.index_bytes() == 40_000 * (2 + 2 + 4) + 4 * 2 * 2001


def test_weight_says_what_to_use_instead():
    layer = make()
    with pytest.raises(AttributeError, match=r"no dense weight: use \.values .* \.pattern .* or \.to_dense\(\)"):
        _ = layer.weight
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = layer.wieght


def test_says_what_it_is():
    assert repr(make((4, 4))) == "SparseLinear(24, 12, density=0.3333, block=4x4)"
    assert repr(make(bias=False)) == "SparseLinear(24, 12, density=0.3333, bias=False)"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"density": 0}, r"density must lie in \(0, 1\], got 0"),
        ({"density": 1.01}, r"density must lie in \(0, 1\], got 1.01"),
        ({"density": 0.5, "block": 5}, "a block of 5x5 does not divide a 12x24 matrix: choose a block that divides"),
        ({"density": 0.5, "block": "4x4"}, "block must be a positive int or a pair"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear(24, 12, **options)


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern.random((12, 24), 0.5),
        Pattern.random((24, 12), 1 / 3),
        Pattern.random((12, 24), 1 / 3, (4, 4)),
    ],
    ids=["units", "shape", "block"],
)
def test_set_pattern_needs_an_equal_one(pattern):
    layer = make()
    before = layer.pattern
    with pytest.raises(ValueError, match=r"a pattern of shape \(12, 24\), block \(1, 1\) and 96 units is needed, got"):
        layer.set_pattern(pattern)
    assert layer.pattern == before


def test_pattern_is_a_copy(block):
    layer = make(block)
    first, second = layer.pattern, make(block, seed=1).pattern
    assert first != second
    layer.set_pattern(second)
    assert layer.pattern == second and first == make(block).pattern
    check_consistent(layer)
    second.crow_indices.zero_()  # whoever breaks the rule breaks their own copy
    assert layer.pattern == make(block, seed=1).pattern


def test_draws_from_its_generator_alone(block):
    state = torch.get_rng_state()
    same, other = make(block), make(block, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same.values, make(block).values) and torch.equal(same.bias, make(block).bias)  # type: ignore[arg-type]
    assert same.pattern != other.pattern and not torch.equal(same.values, other.values)
    same.reset_parameters(torch.Generator().manual_seed(5))
    assert same.pattern == make(block).pattern, "fresh values belong to the same pattern"
    assert not torch.equal(same.values, make(block).values)


# -- from and to dense --


def test_from_dense_keeps_values_as_they_are(block):
    dense = nn.Linear(24, 12)
    pattern = Pattern.random((12, 24), 0.3, block)
    layer = SparseLinear.from_dense(dense, pattern=pattern)
    assert layer.pattern == pattern
    assert torch.equal(layer.dense_weight(), dense.weight.detach() * pattern.to_mask())
    assert layer.bias is not None and torch.equal(layer.bias, dense.bias)
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert layer.values.any() and layer.bias.any(), "the layer owns its memory"


def test_from_dense_by_density_keeps_the_largest():
    dense = nn.Linear(24, 12, bias=False).eval()
    dense.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(dense, density=0.25)
    kept = layer.dense_weight() != 0
    assert int(kept.sum()) == 72
    assert float(dense.weight[kept].abs().min()) >= float(dense.weight[~kept].abs().max())
    assert layer.bias is None and not layer.training and not layer.values.requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs either density= or pattern="),
        ({"density": 0.5, "pattern": Pattern.random((12, 24), 0.5)}, "needs either density= or pattern=, and not both"),
        ({"pattern": Pattern.random((24, 12), 0.5)}, r"for a \(24, 12\) matrix, the layer's weight is \(12, 24\)"),
        ({"density": 0.5, "block": 5}, "does not divide"),
        ({"density": 2}, "density must lie in"),
    ],
)
def test_from_dense_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_dense(nn.Linear(24, 12), **options)


def test_to_dense_computes_the_same_in_its_own_memory(block):
    layer = make(block, dtype=torch.float64).eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear and not dense.training and dense.weight.dtype == torch.float64
    assert torch.equal(dense.weight, scatter(layer.values.detach(), layer.pattern))
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert layer.values.any() and layer.bias.any()  # type: ignore[union-attr]
    assert SparseLinear.from_dense(layer.to_dense(), pattern=layer.pattern).values.equal(layer.values)


# -- copies --


def pickled(layer: SparseLinear) -> SparseLinear:
    return pickle.loads(pickle.dumps(layer))


def torch_saved(layer: SparseLinear) -> SparseLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Counter:
    """A collector that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def add(self, index, dy: Tensor, x: Tensor) -> None:
        self.calls += 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, torch_saved])
def test_copies_share_nothing(block, duplicate: Callable[[SparseLinear], SparseLinear]):
    layer, collector, x = make(block), Counter(), torch.randn(3, 24)
    sinks.arm(layer.sink, collector)
    twin = duplicate(layer)
    assert twin.pattern == layer.pattern and torch.equal(twin(x), layer(x))
    twin(x).sum().backward()
    assert collector.calls == 0, "the copy's backward is not the layer's"
    layer(x).sum().backward()
    assert collector.calls == 1
    twin.set_pattern(make(block, seed=1).pattern)
    with torch.no_grad():
        twin.values.zero_()
    assert layer.pattern == make(block).pattern and torch.equal(layer.values, make(block).values)
    check_consistent(layer)


def test_a_shallow_copy_takes_no_gradient_from_the_layer():
    layer, collector = make(), Counter()
    sinks.arm(layer.sink, collector)
    twin = copy.copy(layer)
    twin(torch.randn(3, 24)).sum().backward()
    assert collector.calls == 0
    layer(torch.randn(3, 24)).sum().backward()
    assert collector.calls == 1


# -- checkpoints --


def test_state_dict_holds_values_pattern_and_bias(block):
    assert list(make(block).state_dict()) == ["values", "bias", "crow_indices", "col_indices"]


@pytest.mark.parametrize("assign", [False, True])
def test_loads_another_pattern_of_equal_size(block, assign):
    saved, layer, x = make(block, seed=1), make(block), torch.randn(4, 24)
    held = layer.values
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    state["col_indices"] = state["col_indices"].int()  # a file may hold them wider
    layer.load_state_dict(state, assign=assign)
    assert layer.pattern == saved.pattern and torch.equal(layer(x), saved(x))
    assert layer.col_indices.dtype == layer.t_rows.dtype == torch.uint16
    assert (layer.values is held) != assign
    check_consistent(layer)
    state["crow_indices"].zero_()
    state["col_indices"].zero_()
    assert layer.pattern == saved.pattern, "indices are the layer's own, even where values are assigned"


def test_loads_inside_a_model():
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(24, 24), SparseLinear(24, 12, density=0.2), nn.ReLU())

    saved, model, x = build(0), build(1), torch.randn(3, 24)
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model(x), saved(x))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda s: s.pop("crow_indices"),
            "values come with crow_indices and col_indices, and one of the three is missing",
        ),
        (lambda s: s.pop("col_indices"), "one of the three is missing"),
        (lambda s: s.pop("values"), "one of the three is missing"),
        (lambda s: [s.pop(k) for k in ("values", "crow_indices", "col_indices")], "Missing key.*values.*crow_indices"),
        (lambda s: s.update(SparseLinear(24, 12, density=0.5).state_dict()), "made with another density or block"),
        (lambda s: s.update(make((4, 4)).state_dict()), "made with another density or block"),
        (lambda s: s.update(SparseLinear(12, 24, density=1 / 3).state_dict()), "crow_indices must have 13 entries"),
        (lambda s: s["crow_indices"].fill_(0), "rise from 0 to the number of units"),
        (lambda s: s.update(col_indices=s["col_indices"].int() + 24), r"col_indices must lie in \[0, 24\)"),
        (lambda s: s.update(col_indices=s["col_indices"].int().flip(0)), "rise strictly inside a row"),
        (lambda s: s.update(col_indices=s["col_indices"][:-1]), "crow_indices must rise from 0"),
        (lambda s: s.update(col_indices=s["col_indices"].float()), "indices must be integers"),
        (lambda s: s.update(nonsense=torch.ones(1)), "Unexpected key.*nonsense"),
        (lambda s: s.pop("bias"), "Missing key.*bias"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_refuses_a_spoilt_state(spoil, message, assign):
    layer = make()
    state = {name: tensor.clone() for name, tensor in make(seed=1).state_dict().items()}
    spoil(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    check_consistent(layer)


@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_state_changes_nothing(assign):
    layer, state = make(), {name: tensor.clone() for name, tensor in make(seed=1).state_dict().items()}
    state["col_indices"] = state["col_indices"].int().flip(0)
    with pytest.raises(RuntimeError, match="SparseLinear: col_indices must rise strictly"):
        layer.load_state_dict(state, assign=assign)
    assert layer.pattern == make().pattern and torch.equal(layer.values, make().values)
    assert torch.equal(layer.bias, make().bias)  # type: ignore[arg-type]


def test_a_dense_checkpoint_is_recognised():
    model = nn.ModuleDict({"up": make()})
    state = nn.ModuleDict({"up": nn.Linear(24, 12)}).state_dict()
    with pytest.raises(RuntimeError, match=r"up\.values \(the checkpoint has a dense weight there\)"):
        model.load_state_dict(state)


def test_a_state_without_the_layer_may_be_allowed():
    model = nn.ModuleDict({"up": make()})
    found = model.load_state_dict({}, strict=False)
    assert "up.values" in found.missing_keys and model["up"].pattern == make().pattern


def test_the_sink_stays_on_the_cpu_and_armed():
    """A GPU that held it would make every backward pass wait."""
    layer = make()
    sink = layer.sink
    moved = layer.to("meta")
    assert moved.sink is sink and sink.device.type == "cpu" and moved.values.device.type == "meta"
    assert copy.deepcopy(moved).sink.device.type == "cpu"


# -- the meta device --


def test_made_on_meta_and_filled_later(block):
    layer = SparseLinear(24, 12, density=1 / 3, block=block, device="meta")
    assert {t.device.type for t in layer.parameters()} == {"meta"} and layer.num_units == make(block).num_units
    with pytest.raises(ValueError, match="made on the meta device and has no pattern yet"):
        _ = layer.pattern
    layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator().manual_seed(0))
    assert layer.pattern == make(block).pattern and torch.equal(layer.values, make(block).values)
    assert layer.sink.tolist() == [0, 0], "to_empty leaves what was in memory"
    check_consistent(layer)


@pytest.mark.parametrize("assign", [False, True])
def test_made_on_meta_and_loaded(block, assign):
    """Both usual ways: to_empty and copy, or assign without ever allocating."""
    with torch.device("meta"):
        layer = SparseLinear(24, 12, density=1 / 3, block=block)
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(make(block).state_dict(), assign=assign)
    x = torch.randn(4, 24)
    assert torch.equal(layer(x), make(block)(x)) and layer.sink.tolist() == [0, 0]
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"cpu"}
    check_consistent(layer)
    layer(x).sum().backward()
