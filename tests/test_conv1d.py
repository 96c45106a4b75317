"""Sparse convolutions along one axis against nn.Conv1d in float64; the operator's own cases are in test_convolution."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy
from rarefy import Pattern, SparseConv1d
from rarefy.cost import Convolution, convolutions_per_layer, tokens_per_layer
from rarefy.export import to_dense_state_dict
from rarefy.files import checkpoint
from rarefy.nn.layer import gather_units
from test_convolution import ROWS


def made(case, dtype=torch.float64) -> tuple[SparseConv1d, torch.Tensor]:
    """A case of the operator as a layer, and its input."""
    images, in_channels, out_channels, size, kernel, stride, padding, dilation, block, density = case
    torch.manual_seed(ROWS.index(case))
    dense = nn.Conv1d(in_channels, out_channels, kernel[1], stride[1], padding[1], dilation[1], dtype=dtype)
    layer = SparseConv1d.from_dense(dense, density=density, block=block)
    return layer, torch.randn(images, in_channels, size[1], dtype=dtype, requires_grad=True)


def gradients(dense: nn.Conv1d, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of x, weight (as a matrix) and bias, in float64."""
    x = x.detach().double().requires_grad_()
    assert dense.bias is not None
    y = dense(x)
    dx, dweight, dbias = torch.autograd.grad(y, [x, dense.weight, dense.bias], dy.double())
    return [y, dx, dweight.flatten(1), dbias]


@pytest.mark.parametrize("inner", [False, True], ids=["positions side by side", "channels side by side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_layer_is_the_dense_one_at_its_units(case, dtype, inner):
    layer, x = made(case, dtype)
    if inner:
        x = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    twin = layer.to_dense()
    assert type(twin) is nn.Conv1d and twin.weight.dtype == dtype
    assert twin.weight.count_nonzero() == layer.values.numel() and layer.bias is not None
    y = layer(x)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, [x, layer.values, layer.bias], dy)]
    assert y.dtype == dtype and y.is_contiguous() != inner

    twin = twin.double()
    exact = gradients(twin, x, dy)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    sizes = gradients(twin, x.abs(), dy.abs())
    for values in (exact, sizes):
        values[2] = gather_units(values[2], layer.pattern)
    positions = dy.shape[0] * dy.shape[2]
    counts = (layer.in_features, layer.out_channels * layer.kernel_size[0], positions, positions)
    for one, two, size, count in zip(found, exact, sizes, counts, strict=True):
        assert one.shape == two.shape
        assert ((one.double() - two).abs() <= (count + 3) * torch.finfo(dtype).eps * size).all()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_gradcheck_and_compile():
    layer, x = made(ROWS[1])
    x = x.detach()[:2].requires_grad_()
    assert layer.bias is not None

    def conv(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(conv, (x, layer.values, layer.bias), fast_mode=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("given, number", [("valid", 0), ("same", 4), (2, 2), ((3,), 3)], ids=str)
def test_padding(given, number):
    conv = nn.Conv1d(4, 8, 5, padding=given, dilation=2, dtype=torch.float64)
    layer = SparseConv1d.from_dense(conv, density=1.0)
    assert layer.padding == (number,)
    x = torch.randn(2, 4, 17, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))


def test_drawn_copied_pickled_and_shown():
    layer = SparseConv1d(4, 8, 3, 2, 1, bias=False, density=0.25)
    assert layer.pattern.shape == (8, 12) and layer.kernel_size == (3,) and layer.bias is None
    x = torch.randn(2, 4, 9)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    again = SparseConv1d(4, 8, 3, 2, 1, bias=False, density=0.25)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    shown = "SparseConv1d(4, 8, kernel_size=(3,), stride=(2,), padding=(1,), dilation=(1,), density=0.25, bias=False)"
    assert repr(layer) == shown
    with pytest.raises(AttributeError, match="SparseConv1d has no dense weight"):
        layer.weight  # noqa: B018


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="groups must divide in_channels and out_channels, got 4 groups of 6 and 8"):
        SparseConv1d(6, 8, 3, groups=4, density=0.5)
    with pytest.raises(ValueError, match=r"stride must be an int of at least 1, got \(1, 1\)"):
        SparseConv1d(4, 8, 3, stride=(1, 1), density=0.5)
    with pytest.raises(ValueError, match=r"kernel_size must be an int of at least 1, got 0"):
        SparseConv1d(4, 8, 0, density=0.5)
    with pytest.raises(ValueError, match='"same" needs a stride of 1'):
        SparseConv1d.from_dense(nn.Conv1d(4, 8, 4, padding="same"), density=0.5)
    with pytest.raises(ValueError, match="pads with zeros only"):
        SparseConv1d.from_dense(nn.Conv1d(4, 8, 3, padding_mode="circular"), density=0.5)
    with pytest.raises(ValueError, match=r"SparseConv1d takes the place of nn.Conv1d, not of Conv2d"):
        SparseConv1d.from_dense(nn.Conv2d(4, 8, 3), density=0.5)
    with pytest.raises(ValueError, match=r"the pattern is for a \(8, 13\) matrix"):
        SparseConv1d.from_dense(nn.Conv1d(4, 8, 3), pattern=Pattern.random((8, 13), 0.5))
    with pytest.raises(ValueError, match=r"must be \(batch, channels, length\)"):
        SparseConv1d(4, 8, 3, density=0.5)(torch.randn(2, 4, 1, 9))
    with pytest.raises(RuntimeError, match="channels = 4"):
        SparseConv1d(4, 8, 3, density=0.5)(torch.randn(2, 5, 9))


# -- in a network -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A first convolution, two that can be sparse, one with groups, one over three axes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 5, padding=2)
        self.conv = nn.Conv1d(8, 16, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv1d(16, 16, 1)
        self.depth = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.volume = nn.Conv3d(16, 16, (1, 1, 3), padding=(0, 0, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.depth(self.point(F.relu(self.conv(F.relu(self.stem(x))))))
        return self.head(self.volume(x[:, :, None, None]).mean(dim=(2, 3, 4)))


def sparse_net(method: rarefy.Method, **options: Any) -> tuple[Any, rarefy.Rewirer]:
    torch.manual_seed(0)
    model = Net()
    return model, rarefy.sparsify(model, rarefy.Plan(density=0.3, method=method, **options))


def test_a_plan_converts_them_and_says_why_not():
    model, rewirer = sparse_net(rarefy.Static(), distribution="erk")
    assert {name: type(layer).__name__ for name, layer in rewirer.layers.items()} == {
        "conv": "SparseConv1d",
        "point": "SparseConv1d",
        "head": "SparseLinear",
    }
    assert "first convolution" in rewirer.left_dense["stem"]
    assert "16 groups (depthwise)" in rewirer.left_dense["depth"]
    assert "it goes over three axes, and the kernels over two" in rewirer.left_dense["volume"]
    assert model.conv.stride == (2,) and model.conv.bias is None
    wanted = rarefy.erk({"conv": (16, 8, 3), "point": (16, 16, 1), "head": (4, 16)}, 0.3)
    for name, layer in rewirer.layers.items():
        assert layer.density == pytest.approx(wanted[name], abs=2 / (layer.out_features * layer.in_features))


def test_what_they_do_is_counted_and_timed():
    model, x = Net(), torch.randn(3, 2, 20)
    assert tokens_per_layer(model, x, ["stem", "conv", "depth", "volume", "head"]) == {
        "stem": 60, "conv": 30, "depth": 30, "volume": 0, "head": 3
    }  # fmt: skip
    assert convolutions_per_layer(model, x, ["conv", "depth"]) == {
        "conv": Convolution((3, 8, 1, 20), (1, 3), (1, 2), (0, 2), axes=1, channels_last=False),
        "depth": Convolution((3, 16, 1, 10), (1, 3), (1, 1), (0, 2), groups=16, axes=1, channels_last=False),
    }
    unbatched = Convolution.of(nn.Conv1d(8, 16, 4, padding="same"), (8, 20))
    assert unbatched.images == (1, 8, 1, 20) and unbatched.size == (1, 20)
    rows = {row["name"]: row for row in rarefy.Plan(density=0.3).explain(model, x).rows}
    assert rows["conv"]["sparse_ms"] > 0 and rows["conv"]["dense_ms"] > 0 and rows["conv"]["kernel"] == [3]
    assert rows["depth"]["dense_ms"] > 0 and rows["volume"]["dense_ms"] is None


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model, rewirer = sparse_net(rarefy.RigL(interval=2, stagger=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer, total_steps=8)
    for _ in range(2):
        x, target = torch.randn(6, 2, 20), torch.randint(4, (6,))
        before, twin = model.conv.pattern, copy.deepcopy(model)
        twin.conv = twin.conv.to_dense()
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        F.cross_entropy(twin(x), target).backward()
        optimizer.step()
    gradient = twin.conv.weight.grad.flatten().abs()
    gradient[before.unit_indices()] = -1
    grown = set(model.conv.pattern.unit_indices().tolist()) - set(before.unit_indices().tolist())
    best = set(torch.sort(gradient, descending=True).indices[: len(grown)].tolist())
    assert grown and grown == best


def test_files_and_export(tmp_path):
    model, rewirer = sparse_net(rarefy.RigL(interval=2))
    path = tmp_path / "net.safetensors"
    rarefy.save(model, path, rewirer=rewirer)
    other, again = sparse_net(rarefy.RigL(interval=2), seed=5)
    rarefy.load_into(path, other, rewirer=again)
    x = torch.randn(2, 2, 20)
    assert torch.equal(other(x), model(x))
    state = to_dense_state_dict(path)
    assert state["conv.weight"].shape == (16, 8, 3)
    plain = Net()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize(
    "kernel, shape", [([3, 3, 3], [8, 54]), ([3], [8, 16]), ([0], [8, 16]), (3, [8, 24]), ([], [8, 8])]
)
def test_a_kernel_that_cannot_be_is_refused_in_a_file(kernel, shape):
    with pytest.raises(ValueError, match=r"conv: a kernel of .* does not fit a matrix of"):
        checkpoint._kernel("conv", {"kernel": kernel, "shape": shape})


def test_made_on_the_meta_device():
    with torch.device("meta"):
        model: Any = Net()
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3))
    model.to_empty(device="cpu")
    for layer in rewirer.layers.values():
        layer.reset_parameters()
    assert model.conv(torch.randn(2, 8, 20)).isfinite().all()


def test_layers_that_are_sparse_already_keep_their_pattern():
    model, _ = sparse_net(rarefy.Static())
    before = model.conv.pattern
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.5))
    assert rewirer.layers["conv"] is model.conv and torch.equal(
        model.conv.pattern.unit_indices(), before.unit_indices()
    )
