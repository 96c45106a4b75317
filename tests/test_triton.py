"""The Triton kernels against dense float64 arithmetic: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import mlp_cases
from cases import CASES, Case, Problem, problem, scatter
from near import Near
from rarefy import AdamW, Constant, Pattern, Plan, Rewirer, RigL, SparseLinear, load_into, save, sparsify
from rarefy.ops import Index, backend, fp8_products, reference, tiled, triton, using
from rarefy.ops.mlp import ACTIVATIONS
from rarefy.recipes.text.networks import make_sparse
from rarefy.recipes.text.task import batches
from rarefy.training.data import load_corpus
from tiny import settings as text_settings
from tiny import write_text

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if not triton.usable():
    pytest.skip("no GPU, and triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

from rarefy.ops.triton import grow, operations, order, panel, sddmm, tuning
from rarefy.ops.triton import product as products
from rarefy.ops.triton.tuning import Tuned, bucket, forced

OPS = torch.ops.rarefy
DEVICE = torch.device("cpu" if triton.interpreted() else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (64, 1), (128, 1)]


def shaped(block: tuple[int, int], rows: int, cols: int, **more: Any) -> Case:
    return Case(out_features=rows * block[0], in_features=cols * block[1], block=block, **more)


def cases_of(block: tuple[int, int]) -> list[Case]:
    wide = 37 if block[1] == 1 else 5
    return [
        shaped(block, 4, wide, density=0.5, batch=37, gaps=True),
        shaped(block, 1, wide, density=0.6, batch=1, bias=False),
        shaped(block, 3, 2, density=0.0, batch=5),
        shaped(block, 2, 3, density=1.0, batch=3, bias=False),
        shaped(block, 2, 3, density=0.5, batch=0),
    ]


GPU_CASES = [case for case in CASES if case.block in BLOCKS] + [case for block in BLOCKS for case in cases_of(block)]
on_every_case = pytest.mark.parametrize("case", GPU_CASES, ids=str)
on_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "_times", False)  # on a GPU, timing the tiles of each of these sizes takes minutes
    with using("triton"):
        yield


def moved(index: Index) -> Index:
    return Index._make([*(array.to(DEVICE) for array in index[:-1]), index.block])


def there(p: Problem) -> Problem:
    """The same problem, its operands where the kernels run."""
    move = {name: getattr(p, name).to(DEVICE) for name in ("values", "x", "dy")}
    return replace(p, **move, index=moved(p.index), bias=None if p.bias is None else p.bias.to(DEVICE))


def sparse(p: Problem) -> tuple[Any, ...]:
    return p.values, *p.index


def admits(near: Near, found: Tensor) -> None:
    assert found.shape == near.exact.shape
    near.admits(found.cpu())


def weight_of(p: Problem, dtype: torch.dtype) -> Near:
    """W as the kernels multiply it: rounded to the activations' dtype where that is narrower than the values'."""
    return Near.of(p.weight) if dtype == p.values.dtype else Near.of(p.weight).stored(dtype)


def expected_output(p: Problem, dtype: torch.dtype) -> Near:
    y = Near.of(p.x.cpu()) @ weight_of(p, dtype).T
    return (y if p.bias is None else y + Near.of(p.bias.cpu())).stored(dtype)


def expected_values_gradient(p: Problem) -> Near:
    dw = Near.of(p.dy.cpu()).T @ Near.of(p.x.cpu())
    return Near(p.gather(dw.exact), p.gather(dw.off))


class Launches:
    """Notes what every kernel is launched with, in place of running it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple] = []

        def launch(kernel: Tuned, grid, *arguments, **constants) -> None:
            sizes = [(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in arguments]
            meta = {"TOKENS": 32, "DEPTH": 32, "WIDTH": 32, "UNITS": 32, "COLUMNS": 32, "GROUP": 2, "WAVES": 0}
            self.seen.append((kernel.name, grid(meta), *sizes, constants))

        monkeypatch.setattr(Tuned, "launch", launch)


# -- the products -----------------------------------------------------------------------------------------------------


@on_every_case
@on_every_dtype
def test_spmm_matches_dense(case, dtype):
    p = there(problem(case, activations=dtype))
    y = OPS.spmm(*sparse(p), p.x, p.bias)
    assert y.dtype == dtype and y.device.type == DEVICE.type
    admits(expected_output(p, dtype), y)


@on_every_case
@on_every_dtype
def test_backward_matches_dense(case, dtype):
    """All three gradients; those of values and bias are fp32 even when activations are not."""
    p = there(problem(case, activations=dtype))
    dx, dvalues, dbias = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    assert (dx.dtype, dvalues.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)
    dy = Near.of(p.dy.cpu())
    admits((dy @ weight_of(p, dtype)).stored(dtype), dx)
    admits(expected_values_gradient(p), dvalues)
    admits(dy.sum(), dbias)
    assert torch.equal(OPS.spmm_t(*sparse(p), p.dy), dx)


@on_every_block
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_may_be_half_too(block, dtype):
    p = there(problem(cases_of(block)[0], dtype))
    admits(expected_output(p, dtype), OPS.spmm(*sparse(p), p.x, p.bias))
    dx, dvalues, dbias = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    assert dx.dtype == dvalues.dtype == dbias.dtype == dtype
    admits((Near.of(p.dy.cpu()) @ Near.of(p.weight)).stored(dtype), dx)
    admits(expected_values_gradient(p).stored(dtype), dvalues)
    admits(Near.of(p.dy.cpu()).sum().stored(dtype), dbias)
    admits(expected_values_gradient(p).stored(dtype), OPS.sddmm(*p.index, p.dy, p.x))


# -- in 8-bit floats --------------------------------------------------------------------------------------------------


def in_fp8(given: Tensor, dtype: torch.dtype) -> Near:
    """What products see of a factor in fp8, the scale included."""
    limit = torch.finfo(dtype).max
    scale = max(given.abs().max().item() if given.numel() else 0.0, 1e-30) / limit
    rounded = (given.float() / torch.tensor(scale)).to(dtype).double() * scale
    return Near(rounded.cpu(), 4 * torch.finfo(torch.float32).eps * rounded.abs().cpu())


def weight_in_fp8(p: Problem) -> Near:
    weight = in_fp8(p.values, torch.float8_e4m3fn)
    return Near(scatter(weight.exact, p.pattern), scatter(weight.off, p.pattern))


def product_in_fp8(a: Near, b: Near) -> Near:
    """a b. The interpreter sums in fp32; tensor cores keep 14 bits of the sum of a tile."""
    exact = a @ b
    return exact if triton.interpreted() else Near(exact.exact, exact.off + 2.0**-13 * (a.size @ b.size))


@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.block[1] > 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_in_fp8(case, dtype):
    """Forward and the gradient of the input by factors of eight bits; gradients of values and bias as ever."""
    p = there(problem(case, activations=dtype))
    before = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    with fp8_products():
        y = OPS.spmm(*sparse(p), p.x, p.bias)
        dx, dvalues, dbias = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    weight = weight_in_fp8(p)
    expected = product_in_fp8(in_fp8(p.x, torch.float8_e4m3fn), weight.T)
    admits((expected if p.bias is None else expected + Near.of(p.bias.cpu())).stored(dtype), y)
    admits(product_in_fp8(in_fp8(p.dy, torch.float8_e5m2), weight).stored(dtype), dx)
    assert torch.equal(dvalues, before[1]) and torch.equal(dbias, before[2])
    assert torch.equal(OPS.spmm_t(*sparse(p), p.dy), before[0])  # outside, as before


@pytest.mark.parametrize("layers", [2, 3])
def test_an_mlp_in_fp8_is_near_one_in_half_precision(layers):
    p = there(problem(shaped((32, 32), 4, 4, density=0.5, batch=40), activations=torch.bfloat16))
    matrices = [(p.values, p.index)] * layers
    biases = [None] * layers

    def run() -> list[Tensor | None]:
        y, z = operations.mlp(matrices, p.x, biases, 0, torch.bfloat16)
        return [y, *operations.mlp_backward(matrices, p.dy, p.x, z, 0, [True] * (1 + 2 * layers))]

    exact = run()
    with fp8_products():
        found = run()
    for one, other in zip(found, exact, strict=True):
        assert one is not None and other is not None
        assert not torch.equal(one, other) or one.dim() == 1  # the last bias sums dy, which nothing rounds
        # Up to six factors, each off by at most an eighth (e5m2) or a sixteenth: at random signs less than their sum.
        assert (one - other).norm() < 0.25 * other.norm()


def test_fp8_leaves_fp32_and_panels_alone():
    for case, dtype in ((cases_of((32, 32))[0], torch.float32), (cases_of((64, 1))[0], torch.bfloat16)):
        p = there(problem(case, activations=dtype))
        before = OPS.spmm(*sparse(p), p.x, p.bias)
        with fp8_products():
            assert torch.equal(OPS.spmm(*sparse(p), p.x, p.bias), before)


def test_fp8_needs_a_gpu_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(triton, "usable", lambda: False)
    with pytest.raises(ValueError, match="need a GPU and triton; leave fp8_products out"), fp8_products():
        pass


@on_every_block
@pytest.mark.parametrize(
    "tiles",
    [
        {"TOKENS": 16, "DEPTH": 16, "GROUP": 1, "WAVES": 0},
        {"TOKENS": 16, "DEPTH": 64, "GROUP": 3, "WAVES": 1},
        {"TOKENS": 64, "DEPTH": 128, "GROUP": 8, "WAVES": 2},
    ],
    ids=str,
)
def test_product_with_any_tiles(block, tiles):
    """Tiles within a unit, of one unit and of several; fewer programs than tiles; a last group that is not full."""
    case = shaped(block, 4, 37 if block[1] == 1 else 5, density=0.6, batch=75, gaps=True)
    p = there(problem(case))
    with forced(products.product_kernel, tiles):
        admits(expected_output(p, torch.float32), OPS.spmm(*sparse(p), p.x, p.bias))
        admits(Near.of(p.dy.cpu()) @ Near.of(p.weight), OPS.spmm_t(*sparse(p), p.dy))


@on_every_block
@pytest.mark.parametrize("tiles", [{"WIDTH": 16, "TOKENS": 16}, {"WIDTH": 128, "TOKENS": 64}], ids=str)
@pytest.mark.parametrize("split", [32, 10_000])
def test_sddmm_with_any_tiles(block, tiles, split, monkeypatch):
    """Units of several rows in a tile, tiles of one unit, tokens in parts that are no multiple of anything."""
    monkeypatch.setattr(sddmm, "SPLIT_TOKENS", split)
    case = shaped(block, 6, 21 if block[1] == 1 else 3, density=0.4, batch=75, gaps=True)
    p = there(problem(case))
    with forced(sddmm.sddmm_kernel, tiles):
        admits(expected_values_gradient(p), OPS.sddmm(*p.index, p.dy, p.x))


@pytest.mark.parametrize("block", [(64, 1), (128, 1)], ids=str)
@pytest.mark.parametrize("units, columns", [(16, 16), (64, 32)])
def test_panels_hand_back_input_gradients_a_few_tokens_at_a_time(block, units, columns, monkeypatch):
    monkeypatch.setattr(panel, "PRODUCT_BYTES", 0)  # which still makes 128 tokens
    case = shaped(block, 3, 45, density=0.4, batch=150, gaps=True)
    p = there(problem(case))
    with (
        forced(panel.unit_products_kernel, {"UNITS": units, "TOKENS": 64}),
        forced(panel.column_sums_kernel, {"COLUMNS": columns, "TOKENS": 64}),
    ):
        admits(Near.of(p.dy.cpu()) @ Near.of(p.weight), OPS.spmm_t(*sparse(p), p.dy))


@st.composite
def any_problem(draw: st.DrawFn) -> tuple[Problem, dict[str, int], dict[str, int]]:
    """Any pattern, skewed or not, with tiles that fit it well or badly."""
    block = draw(st.sampled_from([(16, 16), (32, 32), (64, 1)]))
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 40 if block[1] == 1 else 4))
    units = draw(st.sets(st.integers(0, rows * cols - 1), max_size=rows * cols))
    pattern = Pattern.from_units(
        torch.tensor(sorted(units), dtype=torch.int64), (rows * block[0], cols * block[1]), block
    )
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tokens = draw(st.integers(1, 50))
    values = torch.randn(pattern.num_units, *block, generator=drawn)
    x, dy = (torch.randn(tokens, n, generator=drawn) for n in (pattern.shape[1], pattern.shape[0]))
    weight = scatter(values, pattern).double()
    side = st.sampled_from([16, 32, 64])
    tiles = {
        "TOKENS": draw(side),
        "DEPTH": draw(side),
        "GROUP": draw(st.integers(1, 3)),
        "WAVES": draw(st.integers(0, 1)),
    }
    p = Problem(pattern, Index.of(pattern), values, weight, None, x, dy)
    return p, tiles, {"WIDTH": draw(side), "TOKENS": draw(side)}


@settings(max_examples=40)
@given(any_problem())
def test_any_pattern_with_any_tiles(drawn):
    p, tiles, gradient_tiles = drawn
    q = there(p)
    with forced(products.product_kernel, tiles), forced(sddmm.sddmm_kernel, gradient_tiles):
        admits(expected_output(p, torch.float32), OPS.spmm(*sparse(q), q.x))
        admits(Near.of(p.dy) @ Near.of(p.weight), OPS.spmm_t(*sparse(q), q.dy))
        admits(expected_values_gradient(p), OPS.sddmm(*q.index, q.dy, q.x))
    units, scores = OPS.grow_candidates(*q.index, q.dy, q.x, 5)
    wanted, exact = reference.grow_candidates(p.index, p.dy.double(), p.x.double(), 5)
    torch.testing.assert_close(scores.cpu(), exact, rtol=1e-4, atol=1e-5)
    assert len(set(units.tolist())) == len(wanted) and not set(units.tolist()) & set(p.pattern.unit_indices().tolist())


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_backward_gives_what_is_asked(needs):
    p = there(problem(cases_of((16, 16))[0]))
    every = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    some = OPS.spmm_backward(*sparse(p), p.dy, p.x, list(needs))
    for asked, whole, part in zip(needs, every, some, strict=True):
        assert torch.equal(part, whole) if asked else part.numel() == 0


@pytest.mark.parametrize("block", [(16, 16), (64, 1)], ids=str)
def test_layouts_of_the_inputs_do_not_matter(block):
    p = there(problem(cases_of(block)[0]))
    by_column = p.x.T.contiguous().T
    strided = torch.stack([p.x, -p.x], dim=-1)[..., 0]
    wider = torch.cat([p.x, p.x], dim=1)[:, : p.x.shape[1]]
    ones = torch.ones((), device=DEVICE).expand(p.dy.shape)
    y, dvalues = OPS.spmm(*sparse(p), p.x, p.bias), OPS.sddmm(*p.index, ones.contiguous(), p.x)
    for x in (by_column, strided, wider):
        assert torch.equal(OPS.spmm(*sparse(p), x, p.bias), y)
        assert torch.equal(OPS.sddmm(*p.index, ones, x), dvalues)
    assert torch.equal(OPS.spmm_t(*sparse(p), ones), OPS.spmm_t(*sparse(p), ones.contiguous()))


@pytest.mark.parametrize("block", [(16, 16), (64, 1)], ids=str)
def test_results_are_bitwise_repeatable_whatever_the_order_of_rows(block, monkeypatch):
    p = there(problem(cases_of(block)[0]))
    first = (OPS.spmm(*sparse(p), p.x, p.bias), *OPS.spmm_backward(*sparse(p), p.dy, p.x, [True] * 3))
    monkeypatch.setattr(
        products, "longest_first", lambda pointers: torch.arange(pointers.shape[0] - 1, device=DEVICE).flip(0).int()
    )
    again = (OPS.spmm(*sparse(p), p.x, p.bias), *OPS.spmm_backward(*sparse(p), p.dy, p.x, [True] * 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_are_sorted_anew_only_when_the_pattern_changed():
    pointers = torch.tensor([0, 1, 4, 4, 6], dtype=torch.int32, device=DEVICE)
    found = order.longest_first(pointers)
    assert found.tolist() == [1, 3, 0, 2]
    assert order.longest_first(pointers) is found
    pointers.copy_(torch.tensor([0, 3, 4, 6, 6]))
    assert order.longest_first(pointers) is found  # the same memory, which a captured graph reads
    assert found.tolist() == [0, 2, 1, 3]


# -- MLPs -------------------------------------------------------------------------------------------------------------

GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def check_mlp(p: mlp_cases.Problem, activation: str, saved: torch.dtype) -> None:
    here = {"values": p.values, "biases": p.biases}
    here = {name: [None if t is None else t.to(DEVICE) for t in tensors] for name, tensors in here.items()}
    q = replace(p, **here, patterns=[a.to(DEVICE) for a in p.patterns], x=p.x.to(DEVICE), dy=p.dy.to(DEVICE))
    y, z = q.forward(activation, saved)
    gradients = q.backward(z, activation)
    assert y.dtype == gradients[0].dtype == p.x.dtype and z.dtype == saved
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])
    for exact, found in zip(p.exact(activation, saved), (y, *gradients), strict=True):
        admits(exact, found)


def mlp_problem(batch: int, dtype: torch.dtype, gated: bool, blocks: tuple = ((16, 16), (16, 16)), **more: Any):
    """Values that rounding to the activations' dtype leaves alone."""
    p = mlp_cases.problem(batch, gated=gated, blocks=blocks, dtype=dtype, **more)
    return replace(p, values=[values.to(dtype).float() for values in p.values])


NARROWER = [
    (torch.float32, torch.bfloat16, "gelu"),
    (torch.bfloat16, torch.bfloat16, "gelu"),
    (torch.bfloat16, torch.bfloat16, "squared_relu"),
    (torch.float16, torch.float16, "silu"),
]


@GATED
@pytest.mark.parametrize(
    "rows, saved, activation", [*((torch.float32, torch.float32, name) for name in ACTIVATIONS), *NARROWER], ids=str
)
def test_mlps_match_dense(gated, rows, saved, activation):
    check_mlp(mlp_problem(35, rows, gated, sizes=(32, 48, 16)), activation, saved)


@GATED
@pytest.mark.parametrize("blocks", [((64, 64), (32, 32)), ((128, 1), (16, 16)), ((16, 16), (64, 1))], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 70])
def test_mlps_of_any_blocks_match_dense(gated, blocks, batch):
    """Panels are composed of products and activations, squares are not."""
    p = mlp_problem(batch, torch.float32, gated, blocks, sizes=(64, 128, 64), bias=batch != 1, density=0.5)
    check_mlp(p, "gelu", torch.float32)


@GATED
def test_an_mlp_gives_the_gradients_that_are_asked_for(gated):
    p = mlp_problem(40, torch.float32, gated)
    q = replace(p, patterns=[a.to(DEVICE) for a in p.patterns], values=[v.to(DEVICE) for v in p.values])
    q = replace(q, biases=[None] * len(p.biases), x=p.x.to(DEVICE), dy=p.dy.to(DEVICE))
    _, z = q.forward("silu")
    whole = q.backward(z, "silu")
    for place in range(len(whole)):
        part = q.backward(z, "silu", [at == place for at in range(len(whole))])
        assert torch.equal(part[place], whole[place])
        assert all(gradient.numel() == 0 for at, gradient in enumerate(part) if at != place)


@GATED
def test_squares_are_fused(gated, monkeypatch):
    """No pass over the hidden features of its own: as many launches as products."""
    launches = Launches(monkeypatch)
    p = mlp_problem(40, torch.float32, gated)
    q = replace(p, patterns=[a.to(DEVICE) for a in p.patterns], values=[v.to(DEVICE) for v in p.values])
    q = replace(q, biases=[None] * len(p.biases), x=p.x.to(DEVICE), dy=p.dy.to(DEVICE))
    _, z = q.forward("silu")
    assert [seen[0] for seen in launches.seen] == ["product_kernel"] * len(p.values)
    launches.seen.clear()
    q.backward(z, "silu")
    counted = Counter(seen[0] for seen in launches.seen)
    assert counted == {"product_kernel": len(p.values), "sddmm_kernel": len(p.values)}


# -- growth -----------------------------------------------------------------------------------------------------------


def integer_problem(case: Case) -> Problem:
    """Small integers, many of them zero: every sum is exact in any order and dtype, and ties abound."""
    p, generator = problem(case), case.generator()
    x = torch.randint(-2, 3, p.x.shape, generator=generator).float()
    dy = torch.randint(-2, 3, p.dy.shape, generator=generator).float()
    dy[:, ::3] = 0
    dy[:, : case.block[0]] = 0  # a row of equal scores
    return replace(p, x=x, dy=dy)


@on_every_case
@pytest.mark.parametrize("share", [0.2, 2.0])
def test_grow_candidates_is_exact_with_ties(case, share):
    p = integer_problem(case)
    absent = p.pattern.num_unit_rows * p.pattern.num_unit_cols - p.pattern.num_units
    k = round(share * absent)
    units, scores = reference.grow_candidates(p.index, p.dy.double(), p.x.double(), k)
    q = there(p)
    for dtype in (torch.float32, torch.bfloat16):
        found = OPS.grow_candidates(*q.index, q.dy.to(dtype), q.x.to(dtype), k)
        assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.float32)
        assert found[0].tolist() == units.tolist()
        torch.testing.assert_close(found[1].cpu(), scores, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("block", [(16, 16), (64, 1)], ids=str)
@pytest.mark.parametrize("tiles", [{"WIDTH": 16, "TOKENS": 16}, {"WIDTH": 128, "TOKENS": 64}], ids=str)
def test_growth_a_row_of_units_at_a_time(block, tiles, monkeypatch):
    """Equal scores in different parts: the lower unit wins."""
    monkeypatch.setattr(grow, "SCORES", 1)
    p = integer_problem(shaped(block, 5, 40 if block[1] == 1 else 9, density=0.3, batch=20, gaps=True))
    q = there(p)
    for k in (0, 1, 7, 30):
        with forced(grow.unit_scores_kernel, tiles):
            units, _ = OPS.grow_candidates(*q.index, q.dy, q.x, k)
        assert units.tolist() == reference.grow_candidates(p.index, p.dy.double(), p.x.double(), k)[0].tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's matmul
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_grow_candidates_shows_what_is_not_finite(bad):
    p = there(integer_problem(cases_of((16, 16))[0]))
    p.dy[1, 3] = bad
    _, scores = OPS.grow_candidates(*p.index, p.dy, p.x, 2)
    assert not torch.isfinite(scores).all()


# -- graphs, compilation, devices -------------------------------------------------------------------------------------


@on_every_block
def test_launches_depend_on_sizes_alone(block, monkeypatch):
    """Equal numbers of units, other places: the very same launches, so that a captured graph survives a rewire."""
    launches, found = Launches(monkeypatch), []
    for units in ([0, 1, 2, 5, 11], [3, 7, 8, 9, 10]):
        pattern = Pattern.from_units(torch.tensor(units), (3 * block[0], 4 * block[1]), block)
        index = moved(Index.of(pattern))
        values = torch.zeros(5, *block, device=DEVICE)
        x, dy = (torch.zeros(50, n, device=DEVICE) for n in (index.in_features, index.out_features))
        OPS.spmm(values, *index, x)
        OPS.spmm_backward(values, *index, dy, x, [True, True, True])
        OPS.grow_candidates(*index, dy, x, 3)
        found.append(launches.seen[:])
        launches.seen.clear()
    assert len(found[0]) >= 5 and found[0] == found[1]


class NoSynchronisation(TorchDispatchMode):
    """Raises where the CPU would wait for the GPU: a size or a number that depends on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITS), f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


@on_every_block
def test_nothing_waits_for_the_gpu(block, monkeypatch):
    Launches(monkeypatch)
    p = there(problem(cases_of(block)[0]))
    with NoSynchronisation():
        operations.spmm(p.values, p.index, p.x, p.bias)
        operations.spmm_backward(p.values, p.index, p.dy, p.x, [True, True, True])
        operations.grow_candidates(p.index, p.dy, p.x, 3)


def test_ops_are_registered_correctly():
    p = there(problem(shaped((16, 16), 2, 3, density=0.5, batch=5)))
    torch.library.opcheck(OPS.spmm_t, (*sparse(p), p.dy))
    torch.library.opcheck(OPS.sddmm, (*p.index, p.dy, p.x))
    torch.library.opcheck(OPS.grow_candidates, (*p.index, p.dy, p.x, 2))
    torch.library.opcheck(OPS.spmm_backward, (*sparse(p), p.dy, p.x, [True, True, True], None))
    wants = [t.clone().requires_grad_() for t in (p.values, p.x, p.bias) if t is not None]
    torch.library.opcheck(OPS.spmm, (wants[0], *p.index, wants[1], wants[2], None))


def train(block: int | tuple[int, int], compiled: bool) -> tuple[list[float], nn.Module, int]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    rewirer = sparsify(model, Plan(density=0.3, block=block, method=RigL(interval=2, end=9, fraction=Constant(0.3))))
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rewirer.attach(optimizer, total_steps=12)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    losses = []
    for at in range(4):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(at)).to(DEVICE)
        loss = (run(x) - x).pow(2).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert len(rewirer.history) >= 3 and rewirer.skipped == 0
    return losses, model, counter.frame_count


@pytest.mark.parametrize("first, second", [(DEVICE, torch.device("cpu")), (torch.device("cpu"), DEVICE)], ids=str)
def test_files_move_between_devices_bit_for_bit(first, second, tmp_path):
    """A run saved on one device goes on from the same bits on the other, and is the same file when saved there."""

    def make(device: torch.device, seed: int) -> tuple[nn.Module, AdamW, Rewirer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        rewirer = sparsify(model, Plan(density=0.5, block=16, method=RigL(interval=2, end=9), seed=seed))
        model.to(device)
        optimizer = AdamW(model.parameters(), lr=0.01)
        rewirer.attach(optimizer, total_steps=12)
        return model, optimizer, rewirer

    model, optimizer, rewirer = make(first, 0)
    with using("auto"):  # either device's own kernels
        for at in range(4):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(at)).to(first)
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert rewirer.history
    save(model, tmp_path / "there.safetensors", optimizer=optimizer, rewirer=rewirer)

    other, other_optimizer, other_rewirer = make(second, 1)
    load_into(tmp_path / "there.safetensors", other, optimizer=other_optimizer, rewirer=other_rewirer)
    for key, tensor in model.state_dict().items():
        moved_tensor = other.state_dict()[key]
        assert moved_tensor.device.type == second.type or key.endswith("sink")
        assert torch.equal(tensor.cpu(), moved_tensor.cpu()), key
    save(other, tmp_path / "back.safetensors", optimizer=other_optimizer, rewirer=other_rewirer)
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()


@pytest.mark.parametrize("block", [16, (64, 1)], ids=str)
def test_training_rewires_and_one_graph_holds(block):
    """The loss curve of the CPU kernels within rounding, and every bit the same once compiled."""
    losses, model, _ = train(block, compiled=False)
    compiled_losses, compiled, graphs = train(block, compiled=True)
    assert compiled_losses == losses and graphs == 1
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[key]), key
    if DEVICE.type == "cpu":
        with using("tiled"):
            assert train(block, compiled=False)[0] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_text_run_has_the_loss_curve_and_the_patterns_of_the_cpu_kernels(precision, tmp_path):
    """The whole step: a GPT, its MLPs as one call, growth, and AdamW's kernel."""
    torch._dynamo.reset()
    text = write_text(tmp_path / "text.txt")
    plan = Plan(density=0.4, block=16, method=RigL(interval=2, end=9, fraction=Constant(0.3)), keep_dense=("head",))
    runs = []
    for name, device in (("triton", DEVICE.type), ("auto", "cpu")):
        asked = text_settings(text, width=64, plan=plan, device=device, precision=precision, twin=False).settled(12)
        data, _ = batches(asked, load_corpus(str(text)))
        with using(name):
            twin = make_sparse(asked, asked.plan)
            runs.append(([twin.train_step(data).loss for _ in range(4)], twin.rewirer))
    (losses, rewirer), (theirs, other) = runs
    assert losses == pytest.approx(theirs, rel=2e-3 if precision == "bf16" else 1e-4)
    assert rewirer is not None and other is not None and len(rewirer.history) == len(other.history) >= 3
    if precision == "fp32":
        assert all(layer.pattern == other.layers[name].pattern for name, layer in rewirer.layers.items())


def test_blocks_without_a_kernel_are_refused_by_name():
    p = there(problem(next(case for case in CASES if case.block == (4, 4))))
    with pytest.raises(
        ValueError, match=r"'triton' was asked for, but there is no Triton kernel for blocks of 4x4: fast"
    ):
        OPS.spmm_t(*sparse(p), p.dy)
    q = there(problem(cases_of((16, 16))[0], torch.float64))
    with pytest.raises(ValueError, match=r"compute in float32, bfloat16 and float16, not torch\.float64"):
        OPS.spmm_t(*sparse(q), q.dy)


@pytest.fixture
def compiled_for_gpu(monkeypatch):
    """As on a machine with a GPU, of which the dispatcher asks nothing."""
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "_told", set())


def test_on_a_gpu_the_dispatcher_takes_triton_where_it_can(compiled_for_gpu):
    gpu = torch.device("cuda")
    with using("auto"):
        for block in BLOCKS:
            assert backend.choose(torch.bfloat16, gpu, list(block)) is operations
        with pytest.warns(
            UserWarning, match="at a dense layer's cost or more: there is no Triton kernel for blocks of 1x1"
        ):
            assert backend.choose(torch.float32, gpu, [1, 1]) is tiled
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once; and no one expects speed of float64
            assert backend.choose(torch.float32, gpu, [1, 1]) is tiled
            assert backend.choose(torch.float64, gpu, [16, 16]) is tiled


def test_older_gpus_compute_in_plain_torch(compiled_for_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    triton._too_old.cache_clear()
    try:
        with using("auto"), pytest.warns(UserWarning, match="Ampere or newer, not Tesla T4"):
            assert backend.choose(torch.float32, torch.device("cuda", 0), [16, 16]) is tiled
    finally:
        triton._too_old.cache_clear()


def test_without_triton_a_gpu_computes_in_plain_torch_and_says_why(compiled_for_gpu, monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: False)
    with using("auto"), pytest.warns(UserWarning, match="triton is not installed"):
        assert backend.choose(torch.float32, torch.device("cuda"), [16, 16]) is tiled


@pytest.mark.slow  # a new process
def test_on_a_cpu_nobody_imports_the_kernels():
    code = (
        "import sys, torch, rarefy; layer = rarefy.SparseLinear(32, 32, density=0.5, block=16); "
        "layer(torch.randn(2, 32)).sum().backward(); assert 'rarefy.ops.triton.operations' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(triton.interpreted(), reason="the interpreter has no clock worth asking")
@on_every_block
def test_the_tiles_that_are_fastest_compute_the_same(block, monkeypatch):
    monkeypatch.setattr(tuning, "_times", True)
    p = there(problem(shaped(block, 4, 37 if block[1] == 1 else 5, density=0.5, batch=300), activations=torch.bfloat16))
    admits(expected_output(p, torch.bfloat16), OPS.spmm(*sparse(p), p.x, p.bias))
    dx, dvalues, _ = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    admits((Near.of(p.dy.cpu()) @ weight_of(p, torch.bfloat16)).stored(torch.bfloat16), dx)
    admits(expected_values_gradient(p), dvalues)


@pytest.mark.skipif(triton.interpreted(), reason="needs a GPU")
@on_every_block
def test_a_captured_graph_survives_a_rewire(block):
    """Forward, both gradients and growth, replayed after the pattern was replaced in place."""
    case = shaped(block, 4, 37 if block[1] == 1 else 5, density=0.5, batch=100)
    p = there(problem(case))

    def run() -> tuple[Tensor, ...]:
        y = OPS.spmm(*sparse(p), p.x, p.bias)
        return y, *OPS.spmm_backward(*sparse(p), p.dy, p.x, [True] * 3), *OPS.grow_candidates(*p.index, p.dy, p.x, 3)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    other = Pattern.with_units(case.shape, p.index.num_units, block, torch.Generator().manual_seed(99))
    for array, new in zip(p.index[:-1], Index.of(other)[:-1], strict=True):
        array.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found, again) for found, again in zip(outputs, run(), strict=True))


def test_sizes_share_their_tiles():
    assert [bucket(n) for n in (0, 1, 16, 17, 64, 8191, 8192)] == [16, 16, 16, 32, 64, 8192, 8192]


def test_a_rewire_renews_the_order_that_a_captured_graph_reads():
    layer = SparseLinear(64, 64, density=0.5, block=16, device=DEVICE)
    layer(torch.randn(3, 64, device=DEVICE))
    found = order.longest_first(layer.crow_indices)
    units = torch.tensor([0, 1, 4, 8, 9, 10, 11, 12], device=DEVICE)
    layer.set_pattern(Pattern.from_units(units, (64, 64), 16))
    assert found.tolist() == [2, 0, 1, 3]


def test_copies_of_a_layer_have_an_order_of_their_own():
    layer = SparseLinear(64, 64, density=0.4, block=16, device=DEVICE)
    other = copy.deepcopy(layer)
    x = torch.randn(3, 64, device=DEVICE)
    assert torch.equal(layer(x), other(x))
    assert order.longest_first(layer.crow_indices) is not order.longest_first(other.crow_indices)
