"""Sparse convolutions against dense ones in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy
from rarefy import Pattern, SparseConv2d
from rarefy.cost import Convolution, LayerCost, convolutions_per_layer, tokens_per_layer
from rarefy.export import to_dense_state_dict
from rarefy.ops import Index, available, convolution, tiled, using
from rarefy.ops.geometry import Geometry
from rarefy.ops.reference import dense, unit_indices

OPS = torch.ops.rarefy

#        images, in, out, (H, W), kernel, stride, padding, dilation, block, density, groups if there are any
CASES = [
    (1, 3, 5, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.3),
    (17, 4, 8, (5, 9), (3, 3), (2, 2), (1, 1), (1, 1), (4, 1), 0.2),
    (16, 4, 8, (8, 8), (3, 3), (1, 1), (0, 0), (1, 1), (4, 4), 0.4),
    (5, 6, 4, (11, 8), (5, 3), (2, 1), (2, 0), (1, 2), (1, 1), 0.1),
    (3, 8, 12, (4, 4), (1, 1), (1, 1), (0, 0), (1, 1), (1, 1), 0.2),
    (16, 4, 8, (8, 7), (1, 1), (2, 3), (0, 0), (1, 1), (4, 1), 0.4),
    (2, 2, 3, (2, 2), (4, 4), (1, 1), (1, 1), (1, 1), (1, 1), 0.5),
    (2, 3, 4, (5, 5), (3, 3), (3, 2), (2, 2), (2, 2), (1, 1), 1.0),
    (2, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.0),
    (0, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.3),
    (9, 4, 4, (7, 7), (2, 2), (3, 3), (0, 0), (1, 1), (1, 1), 0.4),
    (9, 4, 4, (8, 9), (1, 2), (3, 4), (0, 0), (1, 1), (4, 1), 0.4),
    (3, 4, 4, (8, 30), (2, 2), (1, 1), (3, 2), (1, 1), (4, 4), 0.4),
    (4, 8, 16, (14, 14), (7, 7), (2, 2), (3, 3), (1, 1), (8, 8), 0.2),
    (4, 16, 32, (9, 9), (3, 3), (2, 2), (1, 1), (1, 1), (16, 16), 0.3),
    (3, 4, 8, (30, 30), (3, 3), (1, 1), (14, 14), (14, 14), (1, 1), 0.4),
    (40, 130, 24, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), (8, 1), 0.1),
]

# More images than a vector of float32 has places, in every kind of block.
MANY = [
    (33, 35, 10, (5, 7), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.2),
    (64, 5, 12, (5, 4), (3, 2), (2, 3), (1, 1), (1, 2), (4, 1), 0.3),
    (20, 8, 12, (6, 5), (3, 3), (1, 2), (1, 1), (1, 1), (4, 4), 0.3),
    (18, 16, 32, (4, 3), (2, 2), (1, 1), (1, 0), (1, 1), (8, 8), 0.3),
    (37, 32, 16, (4, 4), (3, 3), (2, 2), (1, 1), (1, 1), (16, 16), 0.4),
    CASES[-1],
]
# Along one axis: images of one row.
ROWS = [
    (3, 5, 8, (1, 23), (1, 3), (1, 1), (0, 1), (1, 1), (1, 1), 0.4),
    (17, 6, 8, (1, 30), (1, 5), (1, 2), (0, 2), (1, 3), (4, 1), 0.3),
    (33, 8, 12, (1, 19), (1, 4), (1, 1), (0, 3), (1, 2), (4, 4), 0.3),
    (16, 8, 16, (1, 9), (1, 1), (1, 1), (0, 0), (1, 1), (8, 8), 0.5),
]
GROUPED = [
    (3, 8, 6, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.3, 2),
    (17, 6, 6, (6, 5), (3, 3), (1, 2), (1, 1), (1, 1), (1, 1), 0.5, 6),
    (5, 8, 16, (8, 7), (5, 3), (2, 1), (2, 0), (1, 2), (4, 1), 0.3, 4),
    (33, 12, 24, (5, 4), (3, 2), (1, 1), (1, 1), (1, 1), (4, 4), 0.4, 3),
    (16, 32, 32, (4, 4), (2, 2), (2, 2), (1, 0), (1, 1), (8, 8), 0.5, 2),
    (9, 16, 8, (4, 6), (1, 1), (1, 1), (0, 0), (1, 1), (1, 1), 0.4, 4),
    (4, 8, 16, (6, 6), (1, 1), (1, 1), (0, 0), (1, 1), (4, 4), 0.5, 2),
    (18, 16, 8, (5, 6), (1, 1), (2, 2), (0, 0), (1, 1), (4, 1), 0.4, 2),
    (20, 6, 9, (1, 21), (1, 5), (1, 2), (0, 2), (1, 1), (1, 1), 0.3, 3),
    (2, 4, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.0, 2),
    (0, 4, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.3, 2),
]
CASES = CASES[:-1] + MANY + ROWS + GROUPED


def groups_of(case):
    return case[10] if len(case) > 10 else 1


def drawn(case, dtype):
    """values, index, x, bias, geometry."""
    images, in_channels, out_channels, size, kernel, stride, padding, dilation, block, density = case[:10]
    generator = torch.Generator().manual_seed(CASES.index(case))
    shape = (out_channels, in_channels // groups_of(case) * kernel[0] * kernel[1])
    units = round(density * shape[0] * shape[1] / (block[0] * block[1]))
    index = Index.of(Pattern.with_units(shape, units, block, generator))
    values = torch.randn((units,) if block == (1, 1) else (units, *block), generator=generator, dtype=dtype)
    x = torch.randn(images, in_channels, *size, generator=generator, dtype=dtype)
    bias = torch.randn(out_channels, generator=generator, dtype=dtype)
    geometry = Geometry(*(list(pair) for pair in (kernel, stride, padding, dilation)), groups=groups_of(case))
    return values, index, x, bias, geometry


def dense_conv(weight, x, bias, geometry):
    kernel, stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight.view(weight.shape[0], -1, *kernel), bias, stride, padding, dilation, groups)


def gradients(weight, x, bias, geometry, dy):
    """Of weight, x and bias."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (weight, x, bias)]
    return torch.autograd.grad(dense_conv(inputs[0], inputs[1], inputs[2], geometry), inputs, dy)


BACKENDS = [*(name for name in available() if name != "reference"), "dense"]


def compared(case, layout, dtype=torch.float32):
    """y and the gradients of x, values and bias, beside those in float64, what each sums in magnitude, and how many."""
    values, index, x, bias, geometry = drawn(case, torch.float32)
    x = x.to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    inputs = [tensor.requires_grad_() for tensor in (values, x.detach(), bias)]
    used = index
    if layout == "dense":
        used = Index.of(pattern_of(index), by_column=False)
    y = OPS.conv2d(inputs[0], *used, inputs[1], inputs[2], *geometry)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dvalues, dx, dbias = torch.autograd.grad(y, inputs, dy)
    assert y.dtype == dx.dtype == dtype
    if layout == "channels_last" and x.numel():
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))

    weight, wide_x, wide_bias, wide_dy = (t.detach().double() for t in (dense(values, index), x, bias, dy))
    exact = gradients(weight, wide_x, wide_bias, geometry, wide_dy)
    sizes = gradients(weight.abs(), wide_x.abs(), wide_bias.abs(), geometry, wide_dy.abs())
    units = unit_indices(index)

    def at_units(matrix):
        b_r, b_c = index.block
        blocks = matrix.view(matrix.shape[0] // b_r, b_r, -1, b_c).transpose(1, 2).reshape(-1, b_r * b_c)
        return blocks[units].view(values.shape)

    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    reach = dense_conv(weight.abs(), wide_x.abs(), wide_bias.abs(), geometry)
    return [
        (y, dense_conv(weight, wide_x, wide_bias, geometry), reach, weight.shape[1] + 1),
        (dvalues, at_units(exact[0]), at_units(sizes[0]), pixels),
        (dx, exact[1], sizes[1], weight.shape[0] * geometry[0][0] * geometry[0][1]),
        (dbias, exact[2], sizes[2], pixels),
    ]


def pattern_of(index):
    shape, (b_r, b_c) = (index.out_features, index.in_features), index.block
    return Pattern(index.crow, index.cols.to(torch.int32), shape, (b_r, b_c))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_matches_dense(case, backend, layout):
    with using("auto" if backend == "dense" else backend):
        checks = compared(case, "dense" if backend == "dense" else layout)
    eps = torch.finfo(torch.float32).eps
    for found, wanted, size, count in checks:
        assert found.shape == wanted.shape
        assert ((found.double() - wanted).abs() <= (count + 2) * eps * size).all()


@pytest.mark.parametrize("entries", [1, 50])
def test_tiles_of_any_size(entries, monkeypatch):
    monkeypatch.setattr(tiled.tiles, "__defaults__", (entries, 1))
    with using("tiled"):
        for case in [*CASES[:7], *GROUPED]:
            for found, wanted, size, count in compared(case, "contiguous"):
                assert ((found.double() - wanted).abs() <= (count + 2) * 2**-23 * size).all()


ISAS = [name for name in available() if name not in ("reference", "tiled")]


def rounds_factors(case, backend):
    """Whether a product that may round its factors to bf16 does."""
    images, kernel, stride, padding = case[0], *case[4:7]
    product = kernel == stride == (1, 1) and padding == (0, 0)
    return backend == "avx512bf16" and images > 16 and not product


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("case", [*CASES[:9], *MANY, *ROWS, *GROUPED], ids=str)
def test_images_in_bf16(case, backend):
    with using(backend):
        checks = compared(case, "channels_last", torch.bfloat16)
    roundings = 2 if rounds_factors(case, backend) else 1  # of the value, and of the result
    for found, wanted, size, count in checks:
        eps = (count + 2) * 2**-23 + ((1 + 2**-8) ** roundings - 1 if found.dtype == torch.bfloat16 else 0)
        assert ((found.double() - wanted).abs() <= eps * size).all()


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("case", [*MANY, *GROUPED], ids=str)
def test_images_under_medium_precision(case, backend):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with using(backend):
            checks = compared(case, "channels_last")
    finally:
        torch.set_float32_matmul_precision(before)
    roundings = 2 if rounds_factors(case, backend) else 0
    for found, wanted, size, count in checks:
        assert ((found.double() - wanted).abs() <= ((count + 2) * 2**-23 + (1 + 2**-8) ** roundings - 1) * size).all()


@pytest.mark.skipif(len(available()) < 3, reason="there are no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    values, index, x, bias, geometry = drawn(CASES[-1], torch.float32)
    x = x.to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = [t.detach().clone().requires_grad_() for t in (values, x, bias)]
            y = OPS.conv2d(inputs[0], *index, inputs[1], inputs[2], *geometry)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("case", [CASES[0], CASES[3], ROWS[0], ROWS[1], GROUPED[0], GROUPED[5]], ids=str)
def test_gradcheck_opcheck_and_compile(case):
    values, index, x, bias, geometry = drawn(case, torch.float64)
    for tensor in (values, x, bias):
        tensor.requires_grad_()

    def conv(values, x, bias):
        return OPS.conv2d(values, *index, x, bias, *geometry)

    assert torch.autograd.gradcheck(conv, (values, x, bias), fast_mode=True)
    torch.library.opcheck(OPS.conv2d, (values, *index, x, bias, *geometry))
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, x, bias), conv(values, x, bias))


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 4 * 18 - 1), min_size=1))
def test_any_pattern(units):
    index = Index.of(Pattern.from_units(torch.tensor(sorted(units)), (4, 18), (1, 1)))
    values, x = torch.randn(len(units), dtype=torch.float64), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    geometry = Geometry([3, 3], [1, 1], [1, 1], [1, 1])
    y = OPS.conv2d(values, *index, x, None, *geometry)
    torch.testing.assert_close(y, dense_conv(dense(values, index), x, None, geometry))


@pytest.mark.parametrize(
    "shape, reason", [((2, 4, 5, 5), "channels = 3"), ((3, 5, 5), "channels = 3"), ((2, 3, 1, 5), "is larger than")]
)
def test_what_does_not_fit_is_refused(shape, reason):
    values, index, _, bias, _ = drawn(CASES[0], torch.float32)
    with pytest.raises(RuntimeError, match=reason):
        OPS.conv2d(values, *index, torch.randn(shape), bias, [3, 3], [1, 1], [0, 0], [1, 1])


@pytest.mark.parametrize("block", [1, (4, 1), 2])
def test_layer_is_the_dense_one_at_its_units(block):
    dense_layer = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), dtype=torch.float64)
    layer = SparseConv2d.from_dense(dense_layer, density=0.25, block=block)
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)

    assert layer.density == 0.25 and layer.pattern.shape == (8, 24)
    mask = layer.pattern.to_mask().view_as(dense_layer.weight)
    assert torch.equal(layer.to_dense().weight, dense_layer.weight * mask)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    again = SparseConv2d(4, 8, (3, 2), (2, 1), 1, (1, 2), density=0.25, block=block, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    with pytest.raises(AttributeError, match="SparseConv2d has no dense weight"):
        layer.weight  # noqa: B018


def test_layers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 groups of 6 and 8"):
        SparseConv2d(6, 8, 3, groups=3, density=0.5)
    with pytest.raises(ValueError, match="block 4x1 does not fit 4 groups of 2 output channels"):
        SparseConv2d(4, 8, 3, groups=4, block=(4, 1), density=0.5)
    with pytest.raises(ValueError, match="block 4x1 does not fit 4 groups of 2 output channels"):
        SparseConv2d.from_dense(nn.Conv2d(4, 8, 3, groups=4), block=(4, 1), density=0.5)
    with pytest.raises(ValueError, match="stride must be"):
        SparseConv2d(4, 8, 3, stride=0, density=0.5)
    with pytest.raises(ValueError, match='"same" needs a stride of 1'):
        SparseConv2d.from_dense(nn.Conv2d(4, 8, 4, padding="same"), density=0.5)
    with pytest.raises(ValueError, match="padding must be numbers"):
        SparseConv2d(4, 8, 3, padding="full", density=0.5)
    with pytest.raises(ValueError, match="pads with zeros only"):
        SparseConv2d.from_dense(nn.Conv2d(4, 8, 3, padding_mode="circular"), density=0.5)
    with pytest.raises(ValueError, match="divide"):
        SparseConv2d(4, 6, 3, block=4, density=0.5)


@pytest.mark.parametrize("given, numbers", [("valid", (0, 0)), ("same", (2, 1))])
def test_padding_in_words(given, numbers):
    conv = nn.Conv2d(4, 8, (5, 3), padding=given, dtype=torch.float64)
    layer = SparseConv2d.from_dense(conv, density=1.0)
    assert layer.padding == numbers
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer(x[0]), conv(x[0]))  # one image without a batch


def test_layer_that_computes_dense():
    layer = SparseConv2d(8, 8, 3, padding=1, density=0.6)
    x = torch.randn(16, 8, 6, 6)
    before = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    layer.set_compute("dense")
    after = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_layers_are_copied_and_pickled():
    layer = SparseConv2d(4, 8, 3, density=0.3)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


class Net(nn.Module):
    """A first convolution, a residual block with one of one tap, three with groups, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.skip = nn.Conv2d(8, 16, 1, stride=2)
        self.point = nn.Conv2d(16, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.paired = nn.Conv2d(16, 16, 1, groups=2)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.conv1(x)) + self.skip(x))
        return self.head(self.grouped(self.paired(self.depth(self.point(x)))).mean(dim=(2, 3)))


def made(method, density=0.3, **options) -> tuple[Any, rarefy.Rewirer]:
    torch.manual_seed(0)
    model = Net()
    return model, rarefy.sparsify(model, rarefy.Plan(density=density, method=method, **options))


def test_a_plan_converts_convolutions_and_says_why_not():
    model, rewirer = made(rarefy.Static(), distribution="erk")
    assert {name: type(layer).__name__ for name, layer in rewirer.layers.items()} == {
        "conv1": "SparseConv2d",
        "skip": "SparseConv2d",
        "point": "SparseConv2d",
        "paired": "SparseConv2d",
        "grouped": "SparseConv2d",
        "head": "SparseLinear",
    }
    assert "first convolution" in rewirer.left_dense["stem"]
    assert "16 groups (depthwise)" in rewirer.left_dense["depth"]
    assert "groups=4" in repr(model.grouped) and "groups" not in repr(model.conv1)
    shapes = {name: tuple(getattr(Net(), name).weight.shape) for name in rewirer.layers}
    assert shapes["paired"] == (16, 8, 1, 1) and shapes["grouped"] == (16, 4, 3, 3)
    wanted = rarefy.erk(shapes, 0.3)
    for name, layer in rewirer.layers.items():
        assert layer.density == pytest.approx(wanted[name], abs=2 / (layer.out_features * layer.in_features))
    assert model.conv1.stride == (2, 2) and model.conv1.padding == (1, 1) and model.conv1.bias is None


def test_kept_values_are_the_models_own():
    torch.manual_seed(0)
    dense_model, (model, _) = Net(), made(rarefy.Static(), rescale=False)
    mask = model.conv1.pattern.to_mask().view_as(dense_model.conv1.weight)
    assert torch.equal(model.conv1.to_dense().weight, dense_model.conv1.weight * mask)


def test_pixels_are_counted_and_a_low_rank_part_is_refused():
    model, sample = Net(), torch.randn(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert tokens_per_layer(model, sample, ["stem", "conv1", "skip", "depth", "head"]) == {
        "stem": 2 * 64, "conv1": 2 * 16, "skip": 2 * 16, "depth": 2 * 16, "head": 2,
    }  # fmt: skip
    seen = convolutions_per_layer(model, sample, ["conv1", "point", "depth"])
    assert seen == {
        "conv1": Convolution((2, 8, 8, 8), (3, 3), (2, 2), (2, 2), channels_last=False),
        "point": Convolution((2, 16, 4, 4), (1, 1), channels_last=False),
        "depth": Convolution((2, 16, 4, 4), (3, 3), (1, 1), (2, 2), groups=16, channels_last=False),
    }
    assert [conv.size for conv in seen.values()] == [(4, 4)] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    decided = rarefy.Plan(density=0.8, low_rank=1).decide(Net())
    assert "low_rank= is for linear layers" in next(d.why_dense for d in decided if d.name == "conv1")


def test_convolutions_are_timed_on_the_spot_and_stay_dense_where_sparse_is_slower(monkeypatch):
    sample = torch.randn(2, 3, 8, 8)
    costs: dict[str, Any] = {d.name: d.cost for d in rarefy.Plan(density=0.3).decide(Net(), sample)}
    assert all(costs[name].dense_ms > 0 for name in ("stem", "depth", "conv1"))
    assert costs["stem"].sparse_ms is None and costs["conv1"].sparse_ms > 0
    slow = LayerCost(2.0, 1.0)
    monkeypatch.setattr("rarefy.plan.times.measure", lambda *_, **__: slow)
    rewirer = rarefy.sparsify(Net(), rarefy.Plan(density=0.3), sample)
    assert "sparse would be slower here: 2.00 ms against 1.00 ms dense" in rewirer.left_dense["conv1"]


METHODS = [
    rarefy.SET(interval=2),
    rarefy.RigL(interval=2),
    rarefy.RigL(interval=2, signal=rarefy.SampledTokens(tokens=8)),
    rarefy.RigL(interval=4, signal=rarefy.Momentum(steps=2)),
    rarefy.RigL(interval=2, signal=rarefy.NormProduct()),
    rarefy.SRigL(interval=2),
    rarefy.CHTs(interval=2),
    rarefy.MEST(interval=2),
    rarefy.GMP(interval=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'signal', None)}"[:30])
@pytest.mark.parametrize("images_at_once", [1, 100])
def test_methods_rewire_convolutions(method, images_at_once, monkeypatch):
    monkeypatch.setattr(convolution, "PATCH_ENTRIES", images_at_once * 72 * 16)
    model, rewirer = made(method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewirer.attach(optimizer, total_steps=20)
    layers = {name: rewirer.layers[name] for name in ("conv1", "paired", "grouped")}
    first = {name: layer.pattern for name, layer in layers.items()}
    for _ in range(14):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.randint(4, (6,))).backward()
        optimizer.step()
    assert not [name for name, layer in layers.items() if layer.pattern == first[name]]


@pytest.mark.parametrize("name", ["conv1", "paired", "grouped"])
@pytest.mark.parametrize("images_at_once", [2, 100])
def test_rigl_grows_where_the_dense_gradient_is_largest(images_at_once, name, monkeypatch):
    monkeypatch.setattr(convolution, "PATCH_ENTRIES", images_at_once * 72 * 16)
    model, rewirer = made(rarefy.RigL(interval=2, stagger=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer, total_steps=8)
    for _ in range(2):
        x, target = torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
        before, twin = getattr(model, name).pattern, copy.deepcopy(model)
        setattr(twin, name, getattr(twin, name).to_dense())
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        F.cross_entropy(twin(x), target).backward()
        optimizer.step()
    gradient = getattr(twin, name).weight.grad.flatten().abs()
    gradient[before.unit_indices()] = -1
    grown = set(getattr(model, name).pattern.unit_indices().tolist()) - set(before.unit_indices().tolist())
    best = set(torch.sort(gradient, descending=True).indices[: len(grown)].tolist())
    assert grown and grown == best


def test_files_hold_convolutions(tmp_path):
    model, rewirer = made(rarefy.RigL(interval=2))
    path = tmp_path / "net.safetensors"
    rarefy.save(model, path, rewirer=rewirer)
    found = rarefy.load(path)
    assert found["conv1.pattern"].shape == (16, 72)
    torch.manual_seed(1)
    other = Net()
    again = rarefy.sparsify(other, rarefy.Plan(density=0.3, method=rarefy.RigL(interval=2), seed=5))
    rarefy.load_into(path, other, rewirer=again)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    state = to_dense_state_dict(path)
    assert state["conv1.weight"].shape == (16, 8, 3, 3) and state["grouped.weight"].shape == (16, 4, 3, 3)
    plain = Net()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(x), model(x))


def test_made_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3))
    model.to_empty(device="cpu")
    for layer in rewirer.layers.values():
        layer.reset_parameters()
    assert isinstance(model.conv1, SparseConv2d)
    assert model.conv1(torch.randn(2, 8, 6, 6)).isfinite().all()


def test_a_transformers_resnet_and_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    for model in (
        transformers.ResNetForImageClassification(config),
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=16,
                patch_size=8,
            )
        ),
    ):
        rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3, method=rarefy.SET()))
        assert len(rewirer.layers) >= 4 and any("first convolution" in why for why in rewirer.left_dense.values())
        size = 16 if "ViT" in type(model).__name__ else 32
        model(torch.randn(2, 3, size, size)).logits.sum().backward()
        assert all(layer.values.grad is not None for layer in rewirer.layers.values())
