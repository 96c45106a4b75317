"""Layer norm with the addition before it and the cast behind it: against float64, as an operator, and in a GPT."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.models import GPT, GPTConfig
from rarefy.nn import add_norm
from rarefy.ops import available, library, token_shift, using
from rarefy.ops.layer_norm import _CLayerNorm, add_layer_norm

OPS = torch.ops.rarefy
EPS = torch.finfo(torch.float32).eps
NORM_EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 16), (3, 7), (5, 33), (64, 48), (130, 512), (2048, 100)]


@pytest.fixture(params=available())
def backend(request: pytest.FixtureRequest):
    with using(request.param):
        yield request.param


def operands(shape: tuple[int, int], delta: torch.dtype | None, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, delta, weight, bias, dy, dsum."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x, added = draw(*shape) + 3.0, None if delta is None else draw(*shape).to(delta)
    return x, added, draw(shape[1]), draw(shape[1]), draw(*shape).to(dtype), draw(*shape)


def exact(x, delta, weight, bias, dy, dsum) -> list[Tensor]:
    """y, and the gradients of x, weight and bias, in float64, by autograd."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    total = leaves[0] if delta is None else leaves[0] + delta.double()
    y = F.layer_norm(total, x.shape[1:], leaves[1], leaves[2], NORM_EPS)
    loss = (y * dy.double()).sum() + (0 if delta is None else (total * dsum.double()).sum())
    return [y.detach(), *torch.autograd.grad(loss, leaves)]


def bounds(x, delta, weight, bias, dy, dsum, *, rounded: float) -> list[Tensor]:
    """How far fp32 arithmetic may be off, to first order; y is rounded to its dtype besides.

    A sum of C terms is off by (C + 2) eps of its terms' magnitudes; mean and deviation inherit that. `sum` is rounded
    once, to eps of its magnitude, which a norm's 1 / deviation makes larger.
    """
    total = (x if delta is None else x + delta.float()).double()
    C, w = x.shape[1], weight.double().abs()
    rstd = 1 / torch.sqrt(total.var(1, correction=0, keepdim=True) + NORM_EPS)
    centred = (total - total.mean(1, keepdim=True)).abs()
    shift = (C + 4) * EPS * total.abs().mean(1, keepdim=True) + EPS * total.abs()  # of what is centred
    off_rstd = (C + 8) * EPS + (centred * shift).mean(1, keepdim=True) * rstd**2
    normed = centred * rstd
    off = shift * rstd + normed * off_rstd + 2 * EPS * normed
    y_size = normed * w + bias.double().abs()
    off_y = off * w + 3 * EPS * y_size
    off_y = off_y + rounded * (y_size + off_y)
    g = dy.double().abs() * w
    spread = g + g.mean(1, keepdim=True) + normed * (g * normed).mean(1, keepdim=True)
    inner = off * (g * normed).mean(1, keepdim=True) + normed * (g * off).mean(1, keepdim=True)
    off_dx = rstd * (spread * ((C + 8) * EPS + off_rstd) + inner)
    if delta is not None:
        off_dx = off_dx + EPS * (dsum.double().abs() + rstd * spread)
    d, rows = dy.double().abs(), x.shape[0]
    off_weight = (d * off).sum(0) + (rows + 3) * EPS * (d * normed).sum(0)
    return [off_y, off_dx, off_weight, (rows + 2) * EPS * d.sum(0)]


def back(dy: Tensor, period: int) -> Tensor:
    """What reaches the norm of a gradient of y, shifted by a row within every `period` of them; by index arithmetic."""
    if period == 0:
        return dy
    rows, C = dy.shape
    moved, own = dy.clone(), C - C // 2
    moved[:-1, own:] = dy[1:, own:]
    moved[torch.arange(rows) % period == period - 1, own:] = 0
    return moved


@pytest.mark.parametrize("shifts", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, delta, dtype, shifts):
    x, added, weight, bias, dy, dsum = operands(shape, delta, dtype)
    period = 0 if not shifts else shape[0] if shape[0] % 2 else shape[0] // 2
    given = (x, added, weight, bias, back(dy, period), dsum)
    total, y, mean, rstd = OPS.add_layer_norm(x, added, weight, bias, NORM_EPS, dtype, period)
    assert y.dtype == dtype and mean.dtype == rstd.dtype == torch.float32
    if delta is None:
        assert total.numel() == 0
    else:
        assert torch.equal(total, x + added)
    around = x if delta is None else total
    found = OPS.add_layer_norm_backward(dy, None if delta is None else dsum, around, weight, mean, rstd, delta, period)
    dx, ddelta, dweight, dbias = found
    if delta == torch.bfloat16:
        assert torch.equal(ddelta, dx.bfloat16())
    else:
        assert ddelta.numel() == 0
    rounded = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    wanted, allowed = exact(*given), bounds(*given, rounded=rounded)
    if shifts:
        wanted[0], allowed[0] = (token_shift(t.view(-1, period, shape[1])).view(shape) for t in (wanted[0], allowed[0]))
    names = ("y", "dx", "dweight", "dbias")
    for name, got, true, off in zip(names, (y, dx, dweight, dbias), wanted, allowed, strict=True):
        worst = ((got.double() - true).abs() - off).max().item()
        assert worst <= 1e-30, f"{name} is off past what is allowed by {worst:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_whatever_the_threads(dtype):
    x, added, weight, bias, dy, dsum = operands((333, 200), torch.bfloat16, dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            total, y, mean, rstd = OPS.add_layer_norm(x, added, weight, bias, NORM_EPS, dtype)
            runs.append((total, y, *OPS.add_layer_norm_backward(dy, dsum, total, weight, mean, rstd, added.dtype)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


def leaves(delta: torch.dtype | None, kind: torch.dtype) -> list[Any]:
    x, added, weight, bias, *_ = operands((6, 10), delta, kind)
    made = [t if t is None else t.to(kind).requires_grad_() for t in (x, added, weight, bias)]
    if added is not None and delta == torch.bfloat16:
        made[1] = added.detach().requires_grad_()
    return made


@pytest.mark.parametrize("delta", [None, torch.float32], ids=str)
def test_gradcheck(delta):
    given = leaves(delta, torch.float64)

    def both(x, added, weight, bias, shift=False):
        return add_layer_norm(x, added, weight, bias, eps=NORM_EPS, dtype=torch.float64, shift=shift)

    assert torch.autograd.gradcheck(both, given)
    sequences: list[Any] = [
        t if t is None or t.dim() == 1 else t.detach().view(2, 3, -1).requires_grad_() for t in given
    ]
    assert torch.autograd.gradcheck(lambda *leaves: both(*leaves, shift=True), sequences)


@pytest.mark.parametrize("delta", [None, *DTYPES], ids=str)
def test_opcheck(delta):
    for period in (0, 3):
        given = (*leaves(delta, torch.float32), NORM_EPS, torch.bfloat16, period)
        torch.library.opcheck(OPS.add_layer_norm.default, given, atol=1e-2, rtol=1e-2)


def test_only_the_stream_is_read():
    """A loss that does not see y: delta and x get its gradient as it is."""
    x, added, weight, bias = leaves(torch.bfloat16, torch.float32)
    total, _ = add_layer_norm(x, added, weight, bias, eps=NORM_EPS, dtype=torch.bfloat16)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(added.grad, torch.ones_like(added))
    assert weight.grad is None


def test_a_shifted_token_has_half_of_the_one_before():
    x = torch.arange(1.0, 25.0).view(2, 3, 4)
    assert token_shift(x).tolist() == [
        [[1, 2, 0, 0], [5, 6, 3, 4], [9, 10, 7, 8]],
        [[13, 14, 0, 0], [17, 18, 15, 16], [21, 22, 19, 20]],
    ]
    assert token_shift(torch.ones(1, 2, 3)).tolist() == [[[1, 1, 0], [1, 1, 1]]]


def test_bad_shapes_are_named():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"a shift needs activations \(..., tokens, features\), got \(4,\)"):
        add_layer_norm(x[0, 0], None, torch.ones(4), torch.zeros(4), eps=1e-5, dtype=torch.float32, shift=True)
    for period in (-1, 4):
        with pytest.raises(ValueError, match=f"of which 6 is a multiple, got {period}"):
            OPS.add_layer_norm(x.view(6, 4), None, torch.ones(4), torch.zeros(4), 1e-5, torch.float32, period)
    with pytest.raises(ValueError, match=r"delta must be \(2, 3, 4\) like x, got \(2, 3, 5\)"):
        add_layer_norm(x, torch.zeros(2, 3, 5), torch.ones(4), torch.zeros(4), eps=1e-5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight and bias must be \(4,\), got \(3,\) and \(4,\)"):
        add_layer_norm(x, None, torch.ones(3), torch.zeros(4), eps=1e-5, dtype=torch.float32)


# -- in networks -------------------------------------------------------------------------------------------------------


def test_autocast_gets_bf16_and_everybody_else_the_modules_own():
    norm, x, delta = nn.LayerNorm(24), torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    total, y = add_norm(norm, x, delta)
    assert torch.equal(total, x + delta) and torch.equal(y, norm(x + delta))
    assert torch.equal(add_norm(norm, x, delta, shift=True)[1], token_shift(y))
    with torch.autocast("cpu", torch.bfloat16):
        total, y = add_norm(norm, x, delta.bfloat16())
        assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
        torch.testing.assert_close(y.float(), norm(x + delta.bfloat16()), rtol=1e-2, atol=1e-2)
        assert torch.equal(add_norm(norm, x, delta.bfloat16(), shift=True)[1], token_shift(y))
        calls = []
        norm.register_forward_hook(lambda *_: calls.append(1))
        add_norm(norm, x, delta)
        assert calls == [1]  # a hooked module is called
    assert add_norm(nn.LayerNorm(24), x)[0] is x
    assert add_norm(nn.LayerNorm(24, device="meta"), x.to("meta"))[1].device.type == "meta"


def test_a_gpt_under_autocast_computes_what_its_modules_compute():
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=64, layers=2, heads=2, context=48))
    tokens = torch.randint(256, (3, 49))

    def run() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = run()
    hook = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, nn.LayerNorm)]
    theirs = run()
    for handle in hook:
        handle.remove()
    for a, b in zip(ours, theirs, strict=True):  # bf16 products may round the other way here and there
        torch.testing.assert_close(a, b, rtol=0.05, atol=2e-2 * b.abs().max().item())


def test_compiles_whole():
    norm, x, delta = nn.LayerNorm(24), torch.randn(2, 5, 24), torch.randn(2, 5, 24).bfloat16()

    def step(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return add_norm(norm, x, delta)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, plain in zip(compiled(x, delta), step(x, delta), strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=1e-2, atol=1e-2)


# -- the C interface ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(isinstance(library.load(), str), reason="no compiled kernels here")
def test_bad_arguments_are_refused():
    loaded = library.load()
    assert isinstance(loaded, ctypes.CDLL)
    x, out, mean, rstd = torch.zeros(2, 4), torch.full((2, 4), math.nan), torch.zeros(2), torch.zeros(2)
    good = _CLayerNorm(2, 4, 0, 0, 1e-5, None, None)
    pointers = (x.data_ptr(), None, None, out.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    call = loaded.rarefy_layer_norm_forward
    assert call(ctypes.byref(good), *pointers, 1) == 0 and not out.isnan().any()
    for at in (0, 3, 4, 5):
        missing = [None if at == place else p for place, p in enumerate(pointers)]
        assert call(ctypes.byref(good), *missing, 1) == -1
    assert call(ctypes.byref(good), x.data_ptr(), x.data_ptr(), None, *pointers[3:], 1) == -1  # nowhere to put the sum
    for wrong in (
        _CLayerNorm(-1, 4, 0, 0, 1e-5, None, None),
        _CLayerNorm(2, 0, 0, 0, 1e-5, None, None),
        _CLayerNorm(2, 4, 0, 0, 1e-5, None, None, -1),
        _CLayerNorm(2, 4, 0, 0, 1e-5, None, None, 3),
    ):
        assert call(ctypes.byref(wrong), *pointers, 1) == -1
    assert loaded.rarefy_layer_norm_backward(ctypes.byref(good), *[None] * 9, 1) == -1
