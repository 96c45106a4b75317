"""Operators are called without torch's dispatcher where no one looks on, with the same bits; who looks on sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy import SparseConv2d, SparseLinear
from rarefy.ops import operators

BF16 = torch.bfloat16


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def _linear(out: int, features: int) -> SparseLinear:
    return SparseLinear(features, out, density=0.3, block=4)


def _spmm() -> list[Any]:
    layer = _linear(32, 48)
    return [layer.values, *layer.index, _draw(70, 48), layer.bias, None]


def _mlp() -> list[Any]:
    up, down = _linear(64, 32), _linear(32, 64)
    matrices = [up.values, *up.index, down.values, *down.index]
    return [*matrices, _draw(70, 32, dtype=BF16), up.bias, down.bias, "squared_relu", BF16, None, None]


def _gated_mlp() -> list[Any]:
    layers = [_linear(64, 32), _linear(64, 32), _linear(32, 64)]
    matrices = [argument for layer in layers for argument in (layer.values, *layer.index)]
    return [*matrices, _draw(70, 32), *(layer.bias for layer in layers), "silu", torch.float32, None, None, None]


def _causal_attention() -> list[Any]:
    return [_draw(2, 40, 3, 2, 16), None]


def _add_layer_norm() -> list[Any]:
    return [_draw(24, 20), _draw(24, 20, dtype=BF16), _draw(20), _draw(20), 1e-5, BF16, 12]


def _images(channels: int) -> Tensor:
    images = torch.randn(17, channels, 6, 6).to(memory_format=torch.channels_last)
    return images.requires_grad_()


def _conv(channels: int) -> SparseConv2d:
    return SparseConv2d(channels, 16, 3, padding=1, density=0.3, block=(4, 1))


def _batch_norm() -> list[Any]:
    return [_images(8), _images(8), _draw(8), _draw(8), None, None, 1e-5, True]


def _conv2d() -> list[Any]:
    conv = _conv(8)
    return [conv.values, *conv.index, _images(8), conv.bias, *conv.geometry, None]


def _norm_conv2d() -> list[Any]:
    conv = _conv(8)
    norm = [_draw(8), _draw(8), None, None, 1e-5]
    return [conv.values, *conv.index, _images(8), *norm, conv.bias, *conv.geometry, None]


CASES: dict[str, Callable[[], list[Any]]] = {
    case.__name__[1:]: case
    for case in (
        *(_spmm, _mlp, _gated_mlp, _causal_attention, _add_layer_norm),
        *(_batch_norm, _conv2d, _norm_conv2d),
    )
}


def _results(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _run(call: Callable[..., Any], arguments: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients, of a sum of the results that have one, weighted at random."""
    results = _results(call(*arguments))
    wanted = [result for result in results if result.requires_grad and result.grad_fn is not None and result.numel()]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in wanted]
    inputs = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
    gradients = torch.autograd.grad(wanted, inputs, weights)
    if (results[0].dim(), results[-1].dim()) == (2, 3):  # an MLP's z: beyond the last token it is never written
        results[-1] = results[-1].transpose(1, 2).flatten(0, 1)[: results[0].shape[0]]
    return [result.detach() for result in results], list(gradients)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_operator_with_a_gradient_is_here() -> None:
    names = [name for name in vars(operators) if f"{name}_backward" in vars(operators)]
    assert sorted(CASES) == sorted(names)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_have_the_bits_of_the_dispatched_operator(name: str) -> None:
    arguments = CASES[name]()
    direct, dispatched = (_run(call, arguments) for call in (getattr(operators, name), getattr(torch.ops.rarefy, name)))
    for mine, theirs in zip(direct, dispatched, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_goes_around_the_dispatcher_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("went by the dispatcher")

    arguments, call = CASES[name](), getattr(operators, name)
    # What `call` holds is found in its closure; the backward operator's is looked up at each call.
    for function in (call, getattr(operators, f"{name}_backward")):
        cell = function.__closure__[function.__code__.co_freevars.index("dispatched")]
        monkeypatch.setattr(cell, "cell_contents", refuse)
    _run(call, arguments)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_a_mode_sees_the_operator_and_its_gradient(name: str) -> None:
    arguments = CASES[name]()
    with _Seen() as seen:
        _run(getattr(operators, name), arguments)
    assert f"rarefy.{name}.default" in seen.names
    assert f"rarefy.{name}_backward.default" in seen.names


def test_a_profiler_sees_the_operator() -> None:
    layer, x = _linear(32, 48), torch.randn(70, 48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"rarefy::spmm", "rarefy::spmm_backward"} <= names


def test_fake_and_meta_tensors_have_shapes_and_no_numbers() -> None:
    with FakeTensorMode():
        assert _linear_of_fakes().shape == (70, 32)
    layer = SparseLinear(48, 32, density=0.3, device="meta")
    assert layer(torch.empty(70, 48, device="meta")).shape == (70, 32)


def _linear_of_fakes() -> Tensor:
    index = [torch.zeros(33, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), torch.zeros(49, dtype=torch.int32)]
    rows = [torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)]
    return operators.spmm(torch.zeros(9), *index, *rows, [1, 1], torch.zeros(70, 48), None, None)


def test_a_subclass_of_tensor_sees_the_operator() -> None:
    seen: list[str] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    layer = _linear(32, 48)
    y = layer(torch.randn(5, 48).as_subclass(Watched))
    assert isinstance(y, Watched)
    assert any("spmm" in name for name in seen)


def test_traced_symbolically_the_operator_is_a_node() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = _linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            layer = self.layer
            return operators.spmm(layer.values, *layer.index, x, layer.bias, None)

    net, x = Net(), torch.randn(5, 48)
    traced = torch.fx.symbolic_trace(net)
    assert any("spmm" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(x), net(x))


def test_without_gradients_nothing_is_kept_for_them() -> None:
    layer, x = _linear(32, 48), torch.randn(70, 48)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_saved_tensors_go_through_the_users_hooks() -> None:
    arguments, packed = _spmm(), []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        operators.spmm(*arguments).sum().backward()
    assert any(tensor is arguments[7] for tensor in packed)  # x


def test_a_pattern_changed_between_forward_and_backward_is_noticed() -> None:
    layer, x = _linear(32, 48), _draw(70, 48)
    y = layer(x)
    layer.col_indices.copy_(layer.col_indices.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_name_says_what_a_node_of_the_graph_is() -> None:
    y = operators.spmm(*_spmm())
    assert y.grad_fn is not None
    assert type(y.grad_fn).__name__ == "SpmmBackward"
