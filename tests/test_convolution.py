"""Sparse convolutions against dense ones in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import Pattern, SparseConv2d
from rarefy.ops import Index, convolution, tiled
from rarefy.ops.reference import dense, unit_indices

OPS = torch.ops.rarefy

#        images, in, out, (H, W), kernel, stride, padding, dilation, block, density
CASES = [
    (1, 3, 5, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.3),
    (17, 4, 8, (5, 9), (3, 3), (2, 2), (1, 1), (1, 1), (4, 1), 0.2),
    (16, 4, 8, (8, 8), (3, 3), (1, 1), (0, 0), (1, 1), (4, 4), 0.4),
    (5, 6, 4, (11, 8), (5, 3), (2, 1), (2, 0), (1, 2), (1, 1), 0.1),
    (3, 8, 12, (4, 4), (1, 1), (1, 1), (0, 0), (1, 1), (1, 1), 0.2),
    (2, 2, 3, (2, 2), (4, 4), (1, 1), (1, 1), (1, 1), (1, 1), 0.5),
    (2, 3, 4, (5, 5), (3, 3), (3, 2), (2, 2), (2, 2), (1, 1), 1.0),
    (2, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.0),
    (0, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 0.3),
]


def drawn(case, dtype):
    """values, index arguments, x, bias, geometry."""
    images, in_channels, out_channels, size, kernel, stride, padding, dilation, block, density = case
    generator = torch.Generator().manual_seed(CASES.index(case))
    shape = (out_channels, in_channels * kernel[0] * kernel[1])
    units = round(density * shape[0] * shape[1] / (block[0] * block[1]))
    index = Index.of(Pattern.with_units(shape, units, block, generator))
    values = torch.randn((units,) if block == (1, 1) else (units, *block), generator=generator, dtype=dtype)
    x = torch.randn(images, in_channels, *size, generator=generator, dtype=dtype)
    bias = torch.randn(out_channels, generator=generator, dtype=dtype)
    return values, index, x, bias, [list(pair) for pair in (kernel, stride, padding, dilation)]


def dense_conv(weight, x, bias, geometry):
    kernel, stride, padding, dilation = geometry
    return F.conv2d(x, weight.view(weight.shape[0], -1, *kernel), bias, stride, padding, dilation)


def gradients(weight, x, bias, geometry, dy):
    """Of weight, x and bias."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (weight, x, bias)]
    return torch.autograd.grad(dense_conv(inputs[0], inputs[1], inputs[2], geometry), inputs, dy)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("entries", [1, tiled.TILE_ENTRIES])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_matches_dense(case, entries, layout, monkeypatch):
    monkeypatch.setattr(tiled.tiles, "__defaults__", (entries,))
    monkeypatch.setattr(convolution._gradient_tiles, "__defaults__", (entries,))
    values, index, x, bias, geometry = drawn(case, torch.float32)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    inputs = [tensor.requires_grad_() for tensor in (values, x.detach(), bias)]

    y = OPS.conv2d(inputs[0], *index, inputs[1], inputs[2], *geometry)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    dvalues, dx, dbias = torch.autograd.grad(y, inputs, dy)

    weight, wide_x, wide_bias, wide_dy = (t.detach().double() for t in (dense(values, index), x, bias, dy))
    exact = gradients(weight, wide_x, wide_bias, geometry, wide_dy)
    sizes = gradients(weight.abs(), wide_x.abs(), wide_bias.abs(), geometry, wide_dy.abs())
    units, eps = unit_indices(index), torch.finfo(torch.float32).eps

    def at_units(matrix):
        b_r, b_c = index.block
        blocks = matrix.view(matrix.shape[0] // b_r, b_r, -1, b_c).transpose(1, 2).reshape(-1, b_r * b_c)
        return blocks[units].view(values.shape)

    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    terms = weight.shape[1]
    reach = dense_conv(weight.abs(), wide_x.abs(), wide_bias.abs(), geometry)
    checks = [
        (y, dense_conv(weight, wide_x, wide_bias, geometry), reach, terms + 1),
        (dvalues, at_units(exact[0]), at_units(sizes[0]), pixels),
        (dx, exact[1], sizes[1], weight.shape[0] * geometry[0][0] * geometry[0][1]),
        (dbias, exact[2], sizes[2], pixels),
    ]
    for found, wanted, size, count in checks:
        assert found.shape == wanted.shape
        assert ((found.double() - wanted).abs() <= (count + 2) * eps * size).all()


@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_growth_finds_the_best_absent_units(case):
    values, index, x, bias, geometry = drawn(case, torch.float64)
    weight = dense(values, index)
    dy = torch.randn(dense_conv(weight, x, bias, geometry).shape, dtype=torch.float64)
    gradient, *_ = gradients(weight, x, bias, geometry, dy)
    scores = tiled.unit_scores(gradient, index.block).flatten()
    scores[unit_indices(index)] = -1
    absent = int((scores >= 0).sum())

    units, found = OPS.conv2d_grow_candidates(*index, dy, x, *geometry, 6)

    assert len(units) == min(6, absent)
    torch.testing.assert_close(found, torch.sort(scores, descending=True).values[: len(units)])
    torch.testing.assert_close(scores[units], found)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
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
    geometry = [[3, 3], [1, 1], [1, 1], [1, 1]]
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
    dense_layer = torch.nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), dtype=torch.float64)
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
    with pytest.raises(ValueError, match="groups=4"):
        SparseConv2d(4, 8, 3, groups=4, density=0.5)
    with pytest.raises(ValueError, match="stride must be"):
        SparseConv2d(4, 8, 3, stride=0, density=0.5)
    with pytest.raises(ValueError, match="padding must be numbers"):
        SparseConv2d.from_dense(torch.nn.Conv2d(4, 8, 3, padding="same"), density=0.5)
