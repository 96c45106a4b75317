"""Causal attention against float64, in every implementation: values, gradients, bits, compiler and refusals.

B sequences, T tokens, H heads, c features a head.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.models import GPT, GPTConfig
from rarefy.ops import available, causal_attention, library, rotary_table, rotate, using
from rarefy.ops.attention import reference

OPS = torch.ops.rarefy
EPS = torch.finfo(torch.float32).eps
KERNELS = [name for name in available() if name not in ("reference", "tiled")]

# (B, T, H, c): one of everything; tails of tiles, vectors, panels, blocks of queries and strips; several heads.
SHAPES = [
    *((1, 1, 1, 1), (1, 2, 1, 3), (2, 7, 3, 5), (1, 17, 1, 16), (2, 48, 2, 64), (1, 49, 3, 33), (1, 64, 1, 64)),
    *((3, 100, 1, 20), (1, 256, 2, 64), (2, 257, 1, 96), (1, 300, 1, 128), (1, 530, 1, 8), (1, 1100, 1, 17)),
]
on_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_every_backend = pytest.mark.parametrize("name", ["reference", *KERNELS])


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """qkv and dout."""
    B, T, H, c = shape
    generator = torch.Generator().manual_seed(T * c + H)
    qkv = torch.randn(B, T, 3, H, c, generator=generator, dtype=torch.float64) * 1.5
    return qkv.to(dtype), torch.randn(B, T, H, c, generator=generator, dtype=torch.float64).to(dtype)


class Exact(NamedTuple):
    """In float64: the results, and for each the error that fp32 arithmetic in any order may leave, to first order."""

    out: Tensor
    lse: Tensor
    dqkv: Tensor
    out_bound: Tensor
    lse_bound: Tensor
    dqkv_bound: Tensor


def turned(x: Tensor, rotary: Tensor | None, sign: int = 1) -> Tensor:
    """(B, H, T, c) by the angles of the table, or against them."""
    if rotary is None:
        return x
    (first, second), (cosine, sine) = x.chunk(2, dim=-1), rotary.double().chunk(2, dim=-1)
    return torch.cat([first * cosine - sign * second * sine, second * cosine + sign * first * sine], dim=-1)


def summed(x: Tensor, rotary: Tensor | None) -> Tensor:
    """The magnitudes of all that `turned` adds."""
    if rotary is None:
        return x.abs()
    (first, second), (cosine, sine) = x.abs().chunk(2, dim=-1), rotary.double().abs().chunk(2, dim=-1)
    return torch.cat([first * cosine + second * sine, second * cosine + first * sine], dim=-1)


def exact(qkv: Tensor, dout: Tensor, rotary: Tensor | None = None) -> Exact:
    """A sum of n products in any order is off by n eps times the sum of magnitudes, and what follows from it:

    a score by `ds`, each probability by that and by the largest `ds` of its row, relatively, and so on. To be turned
    costs three eps of what is added then, for a query, a key and either gradient.
    """
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    q_sum, k_sum, turning = summed(q, rotary), summed(k, rotary), 0 if rotary is None else 3
    q, k = turned(q, rotary), turned(k, rotary)
    do = dout.double().transpose(1, 2)
    T, c, scale = q.shape[2], q.shape[3], 1 / math.sqrt(q.shape[3])
    above = torch.ones(T, T, dtype=torch.bool).triu(1)
    s = (q @ k.mT * scale).masked_fill(above, -math.inf)
    lse = s.logsumexp(dim=-1)
    p = (s - lse[..., None]).exp()
    out = p @ v
    dp, shift = do @ v.mT, (do * out).sum(dim=-1, keepdim=True)
    ds = p * (dp - shift)
    before = torch.stack([ds @ k, ds.mT @ q]) * scale
    gradients = turned(before, rotary, -1), (p.mT @ do)[None]

    # Scores, their shift by the largest and the exponential: each rounds once, relatively to what it holds.
    magnitude = q_sum @ k_sum.mT * scale
    s_bound = ((c + 4 + 2 * turning) * EPS * magnitude).masked_fill(above, 0.0)
    most = s_bound.amax(dim=-1, keepdim=True) + 4 * EPS * magnitude.masked_fill(above, 0.0).amax(dim=-1, keepdim=True)
    relative = s_bound + most + 4 * EPS
    lse_bound = most[..., 0] + (T + 4) * EPS + 4 * EPS * lse.abs()
    out_bound = ((relative + (T + 4) * EPS) * p) @ v.abs() + (most + (T + 4) * EPS) * (p @ v.abs())
    again = relative + lse_bound[..., None]  # probabilities in the backward pass come from lse
    shift_bound = (do.abs() * out_bound).sum(dim=-1, keepdim=True)
    shift_bound = shift_bound + (c + 2) * EPS * (do.abs() * out.abs()).sum(dim=-1, keepdim=True)
    ds_bound = again * ds.abs() + p * ((c + 4) * EPS * (do.abs() @ v.abs().mT) + shift_bound + 2 * EPS * shift.abs())
    sums = ds_bound + (T + 4 + turning) * EPS * ds.abs()
    dv_bound = ((again + (T + 4) * EPS) * p).mT @ do.abs()
    before_bound = torch.stack([sums @ k_sum, sums.mT @ q_sum]) * scale
    bounds = summed(before_bound, rotary) + turning * EPS * summed(before, rotary), dv_bound[None]
    return Exact(
        *(out.transpose(1, 2), lse, torch.cat(gradients).permute(1, 3, 0, 2, 4)),
        *(out_bound.transpose(1, 2), lse_bound, torch.cat(bounds).permute(1, 3, 0, 2, 4)),
    )


def close(found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    assert found.shape == wanted.shape
    excess = (found.double() - wanted).abs() / (1.01 * bound + 1e-30)
    assert (excess <= 1).all(), f"{excess.max():.3g} times the bound"


@pytest.fixture
def threads():
    """Sets the number of threads; the former comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def both(qkv: Tensor, dout: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = OPS.causal_attention(qkv, rotary)
    return out, lse, OPS.causal_attention_backward(dout, qkv, out, lse, rotary)


def check(name: str, qkv: Tensor, dout: Tensor, rotary: Tensor | None = None) -> None:
    """Everything that both passes give on a backend is as close as fp32 has to be."""
    with using(name):
        out, lse, dqkv = both(qkv, dout, rotary)
    wanted = exact(qkv, dout, rotary)
    close(out, wanted.out, wanted.out_bound)
    close(lse, wanted.lse, wanted.lse_bound)
    close(dqkv, wanted.dqkv, wanted.dqkv_bound)


# -- values -----------------------------------------------------------------------------------------------------------


@on_every_shape
@on_every_backend
def test_it_matches_float64(shape, name):
    qkv, dout = inputs(shape)
    check(name, qkv, dout)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] % 2 == 0], ids=str)
@on_every_backend
def test_queries_and_keys_are_turned_by_their_positions(shape, name):
    qkv, dout = inputs(shape)
    check(name, qkv, dout, rotary_table(shape[1], shape[3], base=100.0))


@on_every_backend
def test_a_turned_score_depends_on_the_distance_alone(name):
    """One query and one key everywhere: every query sees the same scores, the first of the same list of distances."""
    T, c = 40, 8
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, c, generator=generator)
    qkv = torch.stack([q.expand(T, c), k.expand(T, c), torch.eye(T, c)], dim=1)[None, :, :, None]
    with using(name):
        _, lse = OPS.causal_attention(qkv.contiguous(), rotary_table(T, c))
    scores = (rotate(q.expand(1, T, 1, c), rotary_table(T, c)) @ k).flatten() / math.sqrt(c)  # of distance 0, 1, ...
    torch.testing.assert_close(lse.flatten(), scores.logcumsumexp(0), rtol=1e-5, atol=1e-5)


@on_every_backend
def test_large_scores_neither_overflow_nor_blur(name):
    """Scores of hundreds, above and below zero: every softmax all but picks one value."""
    qkv, dout = inputs((1, 70, 2, 24))
    qkv[:, :, :2] *= 8
    assert exact(qkv, dout).lse.abs().max() > 200
    check(name, qkv, dout)


@pytest.mark.parametrize("name", KERNELS)
def test_scores_that_fall_from_strip_to_strip_and_rise_again(name):
    """Past a strip the softmax goes on online: its largest score so far stays, grows, or was long ago."""
    qkv, dout = inputs((1, 1100, 3, 4))
    drift = torch.linspace(0, 40, 1100)
    qkv[0, :, 0, :, 0] = 4.0
    qkv[0, :, 1, :, 0] = torch.stack([drift, -drift, 20 * torch.cos(drift)], dim=1)
    check(name, qkv, dout)


@on_every_backend
def test_autograd_gives_the_gradient(name):
    qkv, dout = inputs((2, 33, 2, 12))
    with using(name):
        out = causal_attention(qkv.requires_grad_())
        (dqkv,) = torch.autograd.grad(out, qkv, dout)
    wanted = exact(qkv.detach(), dout)
    close(out.detach(), wanted.out, wanted.out_bound)
    close(dqkv, wanted.dqkv, wanted.dqkv_bound)


@pytest.mark.parametrize("name", KERNELS)
def test_layouts_of_the_inputs_do_not_matter(name):
    """A strided qkv and the expanded dout of a plain sum give what contiguous copies give."""
    qkv, _ = inputs((2, 20, 3, 8))
    strided, ones = torch.stack([qkv, -qkv], dim=-1)[..., 0], torch.ones(()).expand(2, 20, 3, 8)
    with using(name):
        for a, b in zip(both(strided, ones), both(qkv, ones.contiguous()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", KERNELS)
def test_later_tokens_change_no_bit_of_earlier_ones(name):
    qkv, _ = inputs((2, 150, 2, 16))
    changed = qkv.clone()
    changed[:, 70:] *= -3
    with using(name):
        before, after = causal_attention(qkv), causal_attention(changed)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_finite_shows_and_stays_where_it_belongs(name, bad, which):
    qkv, _ = inputs((1, 90, 2, 8))
    qkv[:, :, 0].abs_()  # so that an infinite key makes scores of plus infinity
    qkv[0, 50, which, 1, 3] = bad
    with using(name):
        out = causal_attention(qkv)
    hit = ~out.isfinite().all(dim=-1)
    earlier = 50 if which < 2 else 50 - 5  # rows of one tile meet each other's values, times zero
    assert not hit[0, :, 0].any() and not hit[0, :earlier, 1].any() and hit[0, 50, 1]
    assert not hit[0, 51:, 1].any() if which == 0 else hit[0, 51:, 1].all()


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_gives_nothing(name):
    with using(name):
        for shape in ((0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4)):
            out, lse, dqkv = both(*inputs(shape))
            assert (out.numel(), lse.numel(), dqkv.numel()) == (0, 0, 0)


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 300, 1, 40), (3, 130, 1, 16), (1, 1100, 3, 8), (4, 50, 5, 8)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_from_any_number_of_threads(name, shape, threads):
    qkv, dout = inputs(shape)
    with using(name):
        threads(1)
        first = both(qkv, dout)
        for count in (1, 2, 3, 5):
            threads(count)
            for a, b in zip(first, both(qkv, dout), strict=True):
                assert torch.equal(a, b)


# -- the operator -----------------------------------------------------------------------------------------------------


def test_gradcheck():
    qkv, _ = inputs((2, 5, 2, 3), torch.float64)
    qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OPS.causal_attention(x)[0], qkv)
    assert torch.autograd.gradcheck(causal_attention, qkv)


def test_gradcheck_of_turned_attention():
    qkv = inputs((2, 5, 2, 4), torch.float64)[0].requires_grad_()
    rotary = rotary_table(5, 4)
    assert torch.autograd.gradcheck(lambda x: OPS.causal_attention(x, rotary)[0], qkv)
    assert torch.autograd.gradcheck(lambda x: causal_attention(x, rotary), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    qkv, dout = inputs((2, 9, 2, 5), dtype)
    out, lse = OPS.causal_attention(qkv)
    torch.library.opcheck(OPS.causal_attention_backward, (dout, qkv, out, lse))
    torch.library.opcheck(OPS.causal_attention, (qkv.requires_grad_(),))
    qkv, dout = inputs((2, 9, 2, 6), dtype)
    rotary = rotary_table(9, 6)
    out, lse = OPS.causal_attention(qkv, rotary)
    torch.library.opcheck(OPS.causal_attention_backward, (dout, qkv, out, lse, rotary))
    torch.library.opcheck(OPS.causal_attention, (qkv.requires_grad_(), rotary))


@pytest.mark.parametrize("rotary", [None, rotary_table(9, 6)], ids=["plain", "rotary"])
def test_one_graph(rotary):
    qkv, dout = inputs((2, 9, 2, 6))
    qkv.requires_grad_()
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    outs = compiled(qkv, rotary), causal_attention(qkv, rotary)
    runs = [[out, *torch.autograd.grad(out, qkv, dout)] for out in outs]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative_is_an_error_and_not_zero():
    qkv = inputs((1, 6, 1, 4))[0].requires_grad_()
    (dqkv,) = torch.autograd.grad(OPS.causal_attention(qkv)[0].sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="causal attention has no second derivative"):
        (dqkv.pow(2).sum() + qkv.sum()).backward()


def test_the_denominators_have_no_gradient():
    _, lse = OPS.causal_attention(inputs((1, 6, 1, 4))[0].requires_grad_())
    assert not lse.requires_grad


def test_float64_runs_in_torch():
    qkv, dout = inputs((2, 20, 2, 8), torch.float64)
    assert torch.equal(causal_attention(qkv), reference(qkv))
    out, lse, dqkv = both(qkv, dout)
    assert out.dtype == lse.dtype == dqkv.dtype == torch.float64
    wanted, rounding = exact(qkv, dout), torch.finfo(torch.float64).eps
    close(out, wanted.out, wanted.out_bound / EPS * rounding)
    close(dqkv, wanted.dqkv, wanted.dqkv_bound / EPS * rounding)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_at_the_border(name, dtype):
    qkv, dout = inputs((2, 70, 2, 24), dtype)
    rotary = rotary_table(70, 24)
    with using(name):
        out, lse, dqkv = both(qkv, dout, rotary)
    assert (out.dtype, lse.dtype, dqkv.dtype) == (dtype, torch.float32, dtype)
    wanted, rounding = exact(qkv, dout, rotary), torch.finfo(dtype).eps
    # out is rounded once; the backward pass reads it rounded, as `exact` lets out be off by its bound.
    close(out, wanted.out, wanted.out_bound / EPS * rounding)
    close(dqkv, wanted.dqkv, wanted.dqkv_bound / EPS * rounding)


@pytest.mark.parametrize("name", KERNELS)
def test_a_named_backend_runs_or_raises(name):
    with using(name), pytest.raises(ValueError, match="asked for, but the attention kernel computes in float32"):
        causal_attention(inputs((1, 3, 1, 2), torch.float64)[0])


@pytest.mark.parametrize("wrong", [torch.zeros(2, 5, 12), torch.zeros(2, 5, 2, 1, 4), torch.zeros(2, 5, 3, 1, 0)])
def test_a_wrong_shape_is_named(wrong):
    with pytest.raises(ValueError, match=r"must be \(batch, tokens, 3, heads, head_dim\), got \(2, 5, "):
        causal_attention(wrong)
    with pytest.raises(ValueError, match=r"must be \(batch, tokens, 3, heads, head_dim\), got \(2, 5, "):
        OPS.causal_attention(wrong)


@pytest.mark.parametrize(
    "wrong",
    [rotary_table(4, 4), rotary_table(5, 2), rotary_table(5, 4).double(), rotary_table(5, 4)[0]],
    ids=["tokens", "head", "dtype", "rank"],
)
def test_a_wrong_table_is_named(wrong):
    with pytest.raises(ValueError, match=r"rotary must be float32 \(5, 4\), .*rotary_table makes one"):
        causal_attention(torch.zeros(1, 5, 3, 1, 4), wrong)


def test_a_head_of_odd_size_cannot_turn():
    with pytest.raises(ValueError, match="a head of 5 has an odd one out"):
        rotary_table(3, 5)
    with pytest.raises(ValueError, match="of an even head_dim"):
        causal_attention(torch.zeros(1, 3, 3, 1, 5), torch.zeros(3, 5))


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="floating-point numbers, got torch"):
        causal_attention(torch.zeros(1, 2, 3, 1, 4, dtype=torch.int64))


def test_a_gpt_computes_what_it_computes_with_torchs_attention():
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=96, layers=2, heads=3, context=80))
    tokens = torch.randint(256, (2, 81))

    def run() -> list[Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = run()
    with using("reference"):
        theirs = run()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -- the C interface ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not KERNELS, reason="no compiled kernels here")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 2, 7), (2, 50, 2, 14), (1, 97, 3, 32)], ids=str)
def test_only_the_outputs_are_written_and_wholly(name, shape, dtype):
    """At addresses that are no more aligned than an element, between guards."""
    qkv, dout = (torch.cat([torch.zeros(1, dtype=dtype), t.flatten()])[1:].view_as(t) for t in inputs(shape, dtype))
    B, T, H, c = shape
    table = None if c % 2 else torch.cat([torch.zeros(1), rotary_table(T, c).flatten()])[1:].view(T, c)
    turns = None if table is None else table.data_ptr()
    counts = ((B * T * H * c, dtype), (B * H * T, torch.float32), (3 * B * T * H * c, dtype))
    rooms = [torch.full((count + 66,), math.nan, dtype=kind) for count, kind in counts]
    out, lse, dqkv = (room[33:-33] for room in rooms)
    half = dtype == torch.bfloat16
    with using(name):
        pointers = [qkv.data_ptr(), turns, out.data_ptr(), lse.data_ptr()]
        library.call("rarefy_attention", *pointers, half, B, T, H, c, 2)
        pointers = [dout.data_ptr(), qkv.data_ptr(), turns, *(t.data_ptr() for t in (out, lse, dqkv))]
        library.call("rarefy_attention_backward", *pointers, half, B, T, H, c, 2)
    for room in rooms:
        assert room[:33].isnan().all() and room[-33:].isnan().all()
    wanted, rounding = exact(qkv, dout, table), torch.finfo(dtype).eps / EPS
    close(out.view(B, T, H, c), wanted.out, wanted.out_bound * rounding)
    # Turned queries and keys may be rounded to bfloat16 again, as factors of dot products.
    close(lse.view(B, H, T), wanted.lse, wanted.lse_bound * (1 if table is None else rounding))
    close(dqkv.view_as(qkv), wanted.dqkv, wanted.dqkv_bound * rounding)


@pytest.mark.skipif(not KERNELS, reason="no compiled kernels here")
def test_bad_arguments_are_refused():
    loaded = library.load()
    assert isinstance(loaded, ctypes.CDLL)
    qkv, out, lse = torch.zeros(1, 2, 3, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2)
    table = rotary_table(2, 4)
    good = (qkv.data_ptr(), None, out.data_ptr(), lse.data_ptr())
    assert loaded.rarefy_attention(*good, 0, 1, 2, 1, 4, 1) == 0
    assert (
        loaded.rarefy_attention(good[0], table.data_ptr(), *good[2:], 0, 1, 2, 1, 3, 1) == -1
    )  # an odd head turns nowhere
    for sizes in ((-1, 2, 1, 4), (1, -2, 1, 4), (1, 2, 1, -4), (1, 2, 1, 0)):
        assert loaded.rarefy_attention(*good, 0, *sizes, 1) == -1
    for missing in (0, 2, 3):
        pointers = [None if at == missing else p for at, p in enumerate(good)]
        assert loaded.rarefy_attention(*pointers, 0, 1, 2, 1, 4, 1) == -1
    assert loaded.rarefy_attention_backward(None, *good, None, 0, 1, 2, 1, 4, 1) == -1
