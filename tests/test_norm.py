"""Batch norm with a residual and ReLU, against torch's own layers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rarefy import SparseConv2d
from rarefy.nn import norm_relu, norm_relu_conv
from rarefy.ops import available, sink, using
from rarefy.ops.norm import batch_norm, runs_kernel

OP = torch.ops.rarefy.batch_norm


def images(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64) + offset
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def drawn_norm(channels: int, **options: bool) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-1, 1)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


def by_torch(norm: nn.BatchNorm2d, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    y = norm(x)
    return F.relu(y if residual is None else y + residual)


def compare(norm, x, residual, run, tolerance):
    """y and all gradients, and the running statistics, against float64."""
    wide_norm = copy.deepcopy(norm).double()
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = run(norm, inputs[0], inputs[1] if residual is not None else None)
    # A mask that rounding decides differently is no error: dy is zero there.
    exact = by_torch(wide_norm, wide[0], wide[1] if residual is not None else None)
    dy = dy * ((y > 0) == (exact > 0))
    found = torch.autograd.grad(y, [*inputs, *norm.parameters()], dy.to(y.dtype))
    wanted = torch.autograd.grad(exact, [*wide, *wide_norm.parameters()], dy.to(y.dtype).double())
    for got, want in zip((y, *found), (exact, *wanted), strict=True):
        assert got.shape == want.shape
        error = (got.double() - want).abs().max()
        assert error <= tolerance * (want.abs().max() + 1), (error, want.abs().max())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        mine, theirs = getattr(norm, name), getattr(wide_norm, name)
        if mine is not None:
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in available() if name != "reference"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 5, 4), (2, 16, 1, 1), (5, 40, 9, 3), (1, 3, 2, 1), (4, 64, 8, 8)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_norm_relu_is_torchs(shape, with_residual, training, backend):
    norm = drawn_norm(shape[1]).train(training)
    x, residual = images(*shape, offset=3.0), images(*shape) if with_residual else None
    with using(backend):
        assert runs_kernel(x) == (backend != "tiled")
        compare(norm, x, residual, norm_relu, 1e-5 if shape[0] * shape[2] * shape[3] > 2 else 1e-3)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_norms_of_other_kinds(options):
    norm = drawn_norm(8, **options)
    for training in (True, False):
        compare(norm.train(training), images(4, 8, 3, 3), None, norm_relu, 1e-5)


def test_images_in_bf16():
    norm = drawn_norm(32)
    compare(norm, images(8, 32, 6, 6, dtype=torch.bfloat16), images(8, 32, 6, 6, dtype=torch.bfloat16), norm_relu, 0.02)


def test_mean_far_from_zero_costs_no_digits():
    norm = drawn_norm(8)
    compare(norm, images(16, 8, 8, 8, offset=1000.0), None, norm_relu, 1e-3)


def test_other_layouts_and_dtypes_run_torchs_own_layers():
    for x in (torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(0, 4, 5, 6)):
        norm = nn.BatchNorm2d(4).to(x.dtype).eval()
        assert not runs_kernel(x)
        assert torch.equal(norm_relu(norm, x), F.relu(norm(x)))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_reference_gradients(training, relu, with_residual):
    x, residual = (torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    statistics = [None, None] if training else [torch.randn(4).double(), torch.rand(4).double() + 0.5]

    def run(x, residual, weight, bias):
        return OP(x, residual if with_residual else None, weight, bias, *statistics, 1e-5, relu)[0]

    assert torch.autograd.gradcheck(run, (x, residual * 1, weight, bias), fast_mode=True)


def test_opcheck_and_compile():
    x, residual = images(4, 8, 3, 3).requires_grad_(), images(4, 8, 3, 3).requires_grad_()
    norm = drawn_norm(8)
    torch.library.opcheck(OP, (x, residual, norm.weight, norm.bias, None, None, 1e-5, True))
    torch.library.opcheck(OP, (x, None, norm.weight, norm.bias, norm.running_mean, norm.running_var, 1e-5, True))
    eager = copy.deepcopy(norm)
    compiled = torch.compile(lambda x, r: norm_relu(norm, x, r), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), norm_relu(eager, x, residual))
    torch.testing.assert_close(norm.running_var, eager.running_var)


@pytest.mark.skipif(len(available()) < 3, reason="there are no compiled kernels")
def test_bits_do_not_depend_on_threads():
    x, before = images(8, 24, 7, 7), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
            y = norm_relu(nn.BatchNorm2d(24), leaf)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_does_not_fit_is_refused():
    norm = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="the residual must be"):
        batch_norm(images(2, 4, 3, 3), images(2, 4, 3, 2), None, None, None, None, eps=1e-5, relu=True)
    with pytest.raises(ValueError, match="4D input"):
        norm_relu(norm, torch.randn(3, 4, 5))


@pytest.mark.parametrize("backend", [name for name in available() if name != "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape, kernel, stride, padding, block",
    [
        ((18, 8, 6, 5), 3, 1, 1, 1),
        ((3, 4, 9, 9), 3, 2, 1, (4, 1)),
        ((5, 20, 4, 4), (1, 3), 1, (2, 0), 4),
        ((5, 8, 4, 4), 1, 2, 0, 1),
        ((5, 8, 4, 4), 1, 1, 0, 1),
        ((2, 3, 7, 7), 2, 1, 1, 1),
    ],
    ids=str,
)
def test_norm_relu_conv_is_its_parts(shape, kernel, stride, padding, block, bias, training, backend):
    norm = drawn_norm(shape[1]).train(training)
    conv = SparseConv2d(shape[1], 8, kernel, stride, padding, bias=bias, density=0.5, block=block)
    wide_norm, wide_conv = copy.deepcopy(norm).double(), conv.to_dense().double()
    x = images(*shape, offset=1.0).requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    with using(backend):
        y = norm_relu_conv(norm, conv, x)
        exact = wide_conv(F.relu(wide_norm(wide_x)))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(y, [x, *norm.parameters(), *conv.parameters()], dy)
    wanted = list(torch.autograd.grad(exact, [wide_x, *wide_norm.parameters(), *wide_conv.parameters()], dy.double()))
    mask = conv.pattern.to_mask()
    at = 3
    wanted[at] = wide_conv_units(wanted[at], conv)
    assert y.is_contiguous(memory_format=torch.channels_last) and mask.any()
    for got, want in zip((y, *found), (exact, *wanted), strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= 1e-4 * (want.abs().max() + 1)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name).double(), getattr(wide_norm, name), rtol=1e-5, atol=1e-5)


def wide_conv_units(gradient: torch.Tensor, conv: SparseConv2d) -> torch.Tensor:
    """A dense convolution's gradient at the units."""
    b_r, b_c = conv.block
    pattern = conv.pattern
    blocks = gradient.flatten(1).view(pattern.num_unit_rows, b_r, -1, b_c).transpose(1, 2).reshape(-1, b_r, b_c)
    return blocks[pattern.unit_indices()].view(conv.values.shape)


@pytest.mark.parametrize("block", [1, (4, 1), 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in available() if name not in ("reference", "tiled")])
def test_norm_relu_conv_where_products_round_their_factors(backend, dtype, block):
    norm, conv = drawn_norm(36).eval(), SparseConv2d(36, 8, 3, padding=1, density=0.5, block=block, bias=False)
    x = images(40, 36, 5, 4, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with using(backend):
            y = norm_relu_conv(norm, conv, x)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            (dvalues,) = torch.autograd.grad(y, [conv.values], dy)
    finally:
        torch.set_float32_matmul_precision(before)

    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    scaled, shift = x.double() * scale.view(-1, 1, 1), norm.bias.double() - norm.running_mean.double() * scale
    z = F.relu(scaled + shift.view(-1, 1, 1))
    reach = scaled.abs() + (norm.bias.double().abs() + (norm.running_mean.double() * scale).abs()).view(-1, 1, 1)
    wide = conv.to_dense().double()
    weight = wide.weight.detach()

    def gradient(images: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        dense = torch.zeros_like(weight, requires_grad=True)
        (found,) = torch.autograd.grad(F.conv2d(images, dense, padding=1), [dense], dy)
        return wide_conv_units(found, conv)

    sums = 2**-23 * (dy.numel() + 8)  # of fp32: more than has any of these sums
    for found, exact, size, affine in (
        (y, F.conv2d(z, weight, padding=1), *(F.conv2d(a, weight.abs(), padding=1) for a in (z, reach))),
        (dvalues, gradient(z, dy.double()), *(gradient(a, dy.double().abs()) for a in (z, reach))),
    ):
        # Both factors, and the result; of what ReLU left, and of what it took its choice by.
        bound = ((1 + 2**-8) ** 3 - 1 + sums) * size + 2**-21 * affine
        assert ((found.double() - exact).abs() <= bound).all()


def test_fused_and_apart_in_bf16_with_hooks_and_compiled():
    norm, conv = drawn_norm(8), SparseConv2d(8, 8, 3, padding=1, density=0.5)
    x = images(16, 8, 6, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(norm_relu_conv(norm, conv, x), conv(norm_relu(norm, x)), rtol=0.02, atol=0.05)
    x = images(16, 8, 6, 6)
    compiled = torch.compile(lambda x: norm_relu_conv(norm, conv, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm_relu_conv(norm, conv, x))
    arguments = (conv.values, *conv.index, x, norm.weight, norm.bias, None, None, 1e-5, None)
    torch.library.opcheck(torch.ops.rarefy.norm_conv2d, (*arguments, [3, 3], [1, 1], [1, 1], [1, 1]))
    seen = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    y = norm_relu_conv(norm, conv, x)
    assert len(seen) == 1 and bool((seen[0] >= 0).all())
    torch.testing.assert_close(y, conv(norm_relu(norm, x)))


def test_growth_sees_what_is_convolved():
    norm, conv = drawn_norm(8), SparseConv2d(8, 8, 3, padding=1, density=0.5)
    x, seen = images(16, 8, 6, 6), []

    class Collector:
        def add(self, index, dy, x):
            seen.append((dy, x))

    collector = Collector()
    for run in (lambda: norm_relu_conv(norm, conv, x), lambda: conv(norm_relu(norm, x))):
        sink.arm(conv.sink, collector)
        run().square().sum().backward()
    sink.disarm(conv.sink)
    assert len(seen) == 2 and sink.take_calls(conv.sink) == 2
    for fused, apart in zip(*seen, strict=True):
        torch.testing.assert_close(fused, apart, rtol=1e-4, atol=1e-4)
