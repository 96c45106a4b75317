"""The four operations on every backend against dense float64 arithmetic, with derived tolerances."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, Case, Problem, problem, scatter
from rarefy import Pattern
from rarefy.ops import Index, available, index_dtype, library, native, tiled, using

OPS = torch.ops.rarefy
EPS = torch.finfo(torch.float32).eps
BF16 = torch.finfo(torch.bfloat16).eps
CPU = torch.device("cpu")


def can_run(backend: str, block: tuple[int, int]) -> bool:
    return backend in ("reference", "tiled") or native.why_not(torch.float32, CPU, list(block)) is None


@pytest.fixture(params=available())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


RUNS = [(case, name) for case in CASES for name in available() if can_run(name, case.block)]
on_every_backend = pytest.mark.parametrize("case, backend", RUNS, ids=str)


@pytest.mark.parametrize("name", available()[2:])
def test_a_block_without_a_kernel_is_refused_by_name(name):
    p = problem(next(case for case in CASES if case.block == (2, 3)))
    with using(name), pytest.raises(ValueError, match=f"{name!r} was asked for, but there is no .* kernel for .* 2x3"):
        OPS.spmm_t(*sparse(p), p.dy)


def sparse(p: Problem) -> tuple[Any, ...]:
    """Values and index, as the ops take them."""
    return p.values, *p.index


def close(
    found: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    terms: Tensor | int,
    *,
    rounded: float = 0.0,
    factors: float = 0.0,
) -> None:
    """|found - exact| <= (terms + 2) eps magnitude: a sum of `terms` fp32 products in any order, then rounded.

    `factors`: relative error of one factor of each product, where it was rounded before.
    """
    assert found.shape == exact.shape
    bound = ((terms + 2) * EPS + factors) * magnitude
    error = (found.double() - exact).abs()
    assert (error <= bound + rounded * (exact.abs() + bound)).all(), f"largest error {error.max():.3g}"


def value_rounding(case: Case, backend: str, dtype: torch.dtype) -> float:
    """AMX and AVX512_BF16 multiply bf16 values: the fp32 ones, rounded."""
    tiles = backend == "amx" and case.block in ((8, 8), (16, 16)) and case.batch >= 64
    dots = backend == "avx512bf16" and case.batch >= 192
    return BF16 / 2 if (tiles or dots) and dtype == torch.bfloat16 else 0.0


def output_bound(p: Problem) -> Tensor:
    bias = 0 if p.bias is None else p.bias.double().abs()
    return p.x.double().abs() @ p.weight.abs().T + bias


def exact_output(p: Problem) -> Tensor:
    return p.x.double() @ p.weight.T + (0 if p.bias is None else p.bias.double())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spmm_matches_dense(case, backend, dtype):
    p = problem(case, activations=dtype)
    with using(backend):
        y = OPS.spmm(*sparse(p), p.x, p.bias)
    assert y.dtype == dtype
    rounded, factors = BF16 if dtype == torch.bfloat16 else 0.0, value_rounding(case, backend, dtype)
    close(y, exact_output(p), output_bound(p), p.fan_in, rounded=rounded, factors=factors)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spmm_t_matches_dense(case, backend, dtype):
    p = problem(case, activations=dtype)
    with using(backend):
        dx = OPS.spmm_t(*sparse(p), p.dy)
    assert dx.dtype == dtype
    rounded, factors = BF16 if dtype == torch.bfloat16 else 0.0, value_rounding(case, backend, dtype)
    magnitude = p.dy.double().abs() @ p.weight.abs()
    close(dx, p.dy.double() @ p.weight, magnitude, p.fan_out[None], rounded=rounded, factors=factors)


@on_every_backend
def test_sddmm_matches_dense(case, backend):
    p = problem(case)
    with using(backend):
        dvalues = OPS.sddmm(*p.index, p.dy, p.x)
    dy, x = p.dy.double(), p.x.double()
    close(dvalues, p.gather(dy.T @ x), p.gather(dy.abs().T @ x.abs()), case.batch)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_matches_dense(case, backend, dtype):
    """All three gradients in one call; those of values and bias are fp32 even when activations are bf16."""
    p = problem(case, activations=dtype)
    with using(backend):
        dx, dvalues, dbias = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    dy, x = p.dy.double(), p.x.double()
    rounded = BF16 if dtype == torch.bfloat16 else 0.0
    assert (dx.dtype, dvalues.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)
    factors = value_rounding(case, backend, dtype)
    close(dx, dy @ p.weight, dy.abs() @ p.weight.abs(), p.fan_out[None], rounded=rounded, factors=factors)
    close(dvalues, p.gather(dy.T @ x), p.gather(dy.abs().T @ x.abs()), case.batch)
    close(dbias, dy.sum(dim=0), dy.abs().sum(dim=0), case.batch)


@pytest.fixture
def medium():
    """Under this precision products may round their factors to bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (8, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("batch", [1, 63, 64, 67, 200])
def test_medium_precision_rounds_factors_at_most(backend, block, batch, medium):
    case = Case(out_features=80, in_features=112, density=0.3, batch=batch, block=block, gaps=True)
    p = problem(case)
    with using(backend):
        y, dx = OPS.spmm(*sparse(p), p.x, p.bias), OPS.spmm_t(*sparse(p), p.dy)
        dvalues = OPS.sddmm(*p.index, p.dy, p.x)
        both = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
    x, dy = p.x.double(), p.dy.double()
    assert y.dtype == dx.dtype == dvalues.dtype == torch.float32
    close(y, exact_output(p), output_bound(p), p.fan_in, factors=1.01 * BF16)
    for found in (dx, both[0]):
        close(found, dy @ p.weight, dy.abs() @ p.weight.abs(), p.fan_out[None], factors=1.01 * BF16)
    for found in (dvalues, both[1]):
        close(found, p.gather(dy.T @ x), p.gather(dy.abs().T @ x.abs()), batch, factors=1.01 * BF16)
    close(both[2], dy.sum(dim=0), dy.abs().sum(dim=0), batch)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_backward_gives_what_is_asked(backend, needs):
    p = problem(CASES[1])
    with using(backend):
        every = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, True])
        some = OPS.spmm_backward(*sparse(p), p.dy, p.x, list(needs))
    for asked, whole, part in zip(needs, every, some, strict=True):
        assert part.shape == whole.shape if asked else part.numel() == 0
        if asked:  # which gradients are wanted may choose another kernel, which adds in another order
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def test_layouts_of_the_inputs_do_not_matter(backend):
    """A transposed x, a strided x and the expanded dy of a plain sum give what contiguous copies give."""
    p = problem(CASES[1])
    by_column = p.x.T.contiguous().T
    strided = torch.stack([p.x, -p.x], dim=-1)[..., 0]
    ones = torch.ones(()).expand(p.dy.shape)
    assert not by_column.is_contiguous() and not strided.is_contiguous() and ones.stride() == (0, 0)
    with using(backend):
        y, dx = OPS.spmm(*sparse(p), p.x, p.bias), OPS.spmm_t(*sparse(p), ones.contiguous())
        dvalues = OPS.sddmm(*p.index, ones.contiguous(), p.x)
        for x in (by_column, strided):
            bound = 2 * (p.fan_in + 2) * EPS * output_bound(p)
            assert ((OPS.spmm(*sparse(p), x, p.bias) - y).abs() <= bound).all()
            torch.testing.assert_close(OPS.sddmm(*p.index, ones, x), dvalues, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(OPS.spmm_t(*sparse(p), ones), dx, rtol=1e-5, atol=1e-5)


def test_results_are_bitwise_repeatable(backend):
    p = problem(CASES[4])
    with using(backend):
        runs = [OPS.spmm_backward(*sparse(p), p.dy, p.x, [True] * 3) for _ in range(3)]
        outputs = [OPS.spmm(*sparse(p), p.x, p.bias) for _ in range(3)]
        grown = [OPS.grow_candidates(*p.index, p.dy, p.x, 50) for _ in range(3)]
    for first, other in zip([*runs[:1], *runs[:1]], runs[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(torch.equal(outputs[0], y) for y in outputs)
    assert all(torch.equal(grown[0][0], units) and torch.equal(grown[0][1], scores) for units, scores in grown)


# -- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fallback", ["reference", "tiled"])
def test_gradcheck(block, bias, fallback):
    case = Case(out_features=2 * block[0], in_features=3 * block[1], density=0.5, batch=2, block=block, bias=bias)
    p = problem(case, torch.float64)
    inputs = [t.requires_grad_() for t in (p.values, p.x, p.bias) if t is not None]

    def run(values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return OPS.spmm(values, *p.index, x, bias)

    with using(fallback):
        assert torch.autograd.gradcheck(run, inputs)


def test_no_second_derivative_is_an_error_and_not_zero():
    """A gradient penalty must not silently miss the sparse layers."""
    p = problem(CASES[0])
    values, x = p.values.requires_grad_(), p.x.requires_grad_()
    (dx,) = torch.autograd.grad(OPS.spmm(values, *p.index, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (dx.pow(2).sum() + values.sum()).backward()


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(block, activations):
    case = Case(out_features=3 * block[0], in_features=2 * block[1], density=0.5, batch=5, block=block)
    p = problem(case, activations=activations)
    sink = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(OPS.spmm_t, (*sparse(p), p.dy))
    torch.library.opcheck(OPS.sddmm, (*p.index, p.dy, p.x))
    torch.library.opcheck(OPS.grow_candidates, (*p.index, p.dy, p.x, 2))
    torch.library.opcheck(OPS.spmm_backward, (*sparse(p), p.dy, p.x, [True, True, True], sink))
    torch.library.opcheck(OPS.spmm_backward, (*sparse(p), p.dy, p.x, [False, True, False], sink))
    wants = [t.clone().requires_grad_() for t in (p.values, p.x, p.bias) if t is not None]
    torch.library.opcheck(OPS.spmm, (wants[0], *p.index, wants[1], wants[2], sink))
    torch.library.opcheck(OPS.spmm, (p.values, *p.index, p.x, None, None))


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("spmm", lambda p: (*sparse(p), p.dy), r"spmm: x must be \(batch, in_features = 5\), got \(3, 7\)"),
        ("spmm", lambda p: (*sparse(p), p.x[0]), "spmm: x must be"),
        ("spmm", lambda p: (*sparse(p), p.x.long()), "floating-point numbers, got torch.int64"),
        ("spmm_t", lambda p: (*sparse(p), p.x), r"spmm_t: dy must be \(batch, out_features = 7\), got \(3, 5\)"),
        ("sddmm", lambda p: (*p.index, p.dy[:2], p.x), "sddmm: dy has 2 rows, x has 3"),
        ("grow_candidates", lambda p: (*p.index, p.dy[:2], p.x, 1), "grow_candidates: dy has 2 rows, x has 3"),
    ],
)
def test_wrong_shapes_are_named(op, arguments, message):
    p = problem(CASES[0])
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*arguments(p))


# -- growth -----------------------------------------------------------------------------------------------------------


def expected_growth(p: Problem, gradient: Tensor, k: int) -> tuple[list[int], list[float]]:
    """By sorting every absent unit by (-score, unit index), one at a time."""
    b_r, b_c = p.pattern.block
    cols, active = p.pattern.num_unit_cols, set(p.pattern.unit_indices().tolist())
    scored = []
    for unit in range(p.pattern.num_unit_rows * cols):
        if unit not in active:
            row, col = divmod(unit, cols)
            entries = gradient[row * b_r : (row + 1) * b_r, col * b_c : (col + 1) * b_c]
            scored.append((-float(entries.abs().mean()), unit))
    best = sorted(scored)[:k]
    return [unit for _, unit in best], [-score for score, _ in best]


GROWTH = [run for run in RUNS if run[0].out_features * run[0].in_features < 10_000]


def integer_problem(case: Case, high: int = 2) -> Problem:
    """Small integers, many of them zero: every sum is exact in fp32 in any order, and ties abound."""
    p = problem(case)
    generator = case.generator()
    x = torch.randint(-high, high + 1, p.x.shape, generator=generator).float()
    dy = torch.randint(-high, high + 1, p.dy.shape, generator=generator).float()
    dy[:, ::3] = 0  # dead rows
    return Problem(p.pattern, p.index, p.values, p.weight, p.bias, x, dy)


@pytest.mark.parametrize("case, backend", GROWTH, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0, 2.0])
def test_grow_candidates_is_exact_with_ties(case, backend, share):
    p = integer_problem(case)
    absent = p.pattern.num_unit_rows * p.pattern.num_unit_cols - p.pattern.num_units
    k = round(share * absent)
    with using(backend):
        units, scores = OPS.grow_candidates(*p.index, p.dy, p.x, k)
    wanted, their_scores = expected_growth(p, p.dy.T @ p.x, k)
    assert units.tolist() == wanted
    torch.testing.assert_close(scores, torch.tensor(their_scores, dtype=torch.float32), rtol=2 * EPS, atol=0)
    assert (units.dtype, scores.dtype) == (torch.int64, torch.float32)


def test_grow_candidates_over_many_tiles(backend):
    """More unit rows than a tile holds, equal scores across tiles: the lower unit wins."""
    case = Case(out_features=700, in_features=64, density=0.1, batch=2)
    p = integer_problem(case, high=1)
    gradient = p.dy.T @ p.x
    with using(backend):
        for k in (1, 100, 5000):
            units, _ = OPS.grow_candidates(*p.index, p.dy, p.x, k)
            score = gradient.abs().flatten()
            score[p.pattern.unit_indices()] = -1
            assert torch.equal(units, torch.sort(score, descending=True, stable=True).indices[:k])


def test_grow_candidates_when_nothing_stands_out(backend):
    """A zero gradient: the lowest absent units, as if sorted by index alone."""
    p = problem(CASES[1])
    with using(backend):
        units, scores = OPS.grow_candidates(*p.index, torch.zeros_like(p.dy), p.x, 40)
    absent = sorted(set(range(33 * 17)) - set(p.pattern.unit_indices().tolist()))
    assert units.tolist() == absent[:40] and not scores.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_grow_candidates_shows_what_is_not_finite(backend, bad):
    p = integer_problem(Case(out_features=40, in_features=30, density=0.2, batch=4))
    active_row = int(p.pattern.row_indices()[0])
    dy = p.dy.clone()
    dy[1, active_row] = bad
    with using(backend):
        _, scores = OPS.grow_candidates(*p.index, dy, p.x, 3)
    assert not torch.isfinite(scores).all()


PEAK = """
import resource, sys, torch
from rarefy import Pattern
from rarefy.ops import Index, using
side, backend = int(sys.argv[1]), sys.argv[2]
index = Index.of(Pattern.random((side, side), 0.01, generator=torch.Generator().manual_seed(0)))
x, dy = torch.randn(4, side), torch.randn(4, side)
with using(backend):
    torch.ops.rarefy.grow_candidates(*Index.of(Pattern.random((256, 256), 0.1)), dy[:, :256], x[:, :256], 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.ops.rarefy.grow_candidates(*index, dy, x, 1000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
@pytest.mark.parametrize("which", ["tiled", available()[-1]])
def test_grow_candidates_streams(which):
    """The dense gradient of 8192 x 8192 would be 256 MiB; what growth adds to the peak is a tile and k candidates."""
    side = 8192
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(side), which], capture_output=True, text=True, check=True, timeout=200
    )
    assert int(found.stdout) < side * side * 4 / 4


# -- backends ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few entries, so that small matrices have many."""
    whole = tiled.tiles
    monkeypatch.setattr(tiled, "tiles", lambda index, entries=None, groups=1: whole(index, 20, groups))


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("gaps", [True, False])
def test_tiled_with_many_tiles(small_tiles, block, gaps):
    case = Case(out_features=12 * block[0], in_features=7 * block[1], density=0.3, batch=6, block=block, gaps=gaps)
    p = integer_problem(case)
    gradient = p.dy.T @ p.x
    assert len(list(tiled.tiles(p.index))) > 4
    with using("tiled"):
        close(OPS.spmm(*sparse(p), p.x, p.bias), exact_output(p), output_bound(p), p.fan_in)
        dx, dvalues, _ = OPS.spmm_backward(*sparse(p), p.dy, p.x, [True, True, False])
        close(dx, p.dy.double() @ p.weight, p.dy.double().abs() @ p.weight.abs(), p.fan_out[None])
        assert torch.equal(dvalues, p.gather(gradient))
        for k in (1, 7, 30):
            assert OPS.grow_candidates(*p.index, p.dy, p.x, k)[0].tolist() == expected_growth(p, gradient, k)[0]


def test_the_package_calls_the_interface_that_the_source_has():
    """Fails when csrc/rarefy.h changes: then put the new digest into `library.INTERFACE`."""
    header = Path(__file__).parents[1] / "csrc" / "rarefy.h"
    assert hashlib.sha256(header.read_bytes()).hexdigest()[:16] == library.INTERFACE


@pytest.mark.skipif(isinstance(library.load(), str), reason="no compiled kernels here")
@pytest.mark.parametrize("other", ["an older one", "one that does not say"])
def test_a_library_of_another_version_is_not_used(other, monkeypatch):
    if other == "an older one":
        monkeypatch.setattr(library, "INTERFACE", "0" * 16)
    else:
        monkeypatch.setattr(library.ctypes, "CDLL", lambda path: SimpleNamespace())
    assert "were built from another version of the source" in str(library.load.__wrapped__())


def test_using_takes_available_names_only():
    with pytest.raises(ValueError, match="'gpu' is not available here; there are: reference, tiled"), using("gpu"):
        pass


def test_using_ends_with_its_block():
    from rarefy.ops import backend, library

    before = backend._named, library.isa()
    with pytest.raises(KeyError), using(available()[-1]), using("reference"):
        raise KeyError
    assert (backend._named, library.isa()) == before


def test_a_named_backend_runs_or_raises():
    """float64 has no kernel: by default plain torch takes over, but not when a kernel was asked for by name."""
    p = problem(CASES[0], torch.float64)
    close(OPS.spmm(*sparse(p), p.x, p.bias), exact_output(p), output_bound(p), p.fan_in)
    for name in available()[2:]:
        with using(name), pytest.raises(ValueError, match="asked for, but the compiled kernels compute in float32"):
            OPS.spmm(*sparse(p), p.x, p.bias)


@pytest.mark.skipif(len(available()) == 2, reason="no compiled kernels here")
def test_threads_may_split_the_work_anyhow():
    p = problem(CASES[4])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with using(available()[-1]):
                close(OPS.spmm(*sparse(p), p.x, p.bias), exact_output(p), output_bound(p), p.fan_in)
    finally:
        torch.set_num_threads(threads)


# -- index ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, cols, dtype",
    [(4, 65_536, torch.uint16), (65_536, 4, torch.uint16), (4, 65_537, torch.int32), (65_537, 4, torch.int32)],
)
def test_indices_are_narrow_where_they_fit(rows, cols, dtype):
    assert index_dtype(rows, cols) == dtype
    index = Index.of(Pattern.from_units(torch.tensor([0, rows * cols - 1]), (rows, cols)))
    assert index.cols.dtype == index.t_rows.dtype == dtype
    assert index.cols.tolist() == [0, cols - 1] and index.t_rows.tolist() == [0, rows - 1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_transpose_is_the_sort(case):
    """The counting sort of the kernels and the stable sort in torch give the same arrays."""
    pattern = case.pattern()
    index = Index.of(pattern)
    assert (index.out_features, index.in_features, index.num_units) == (*pattern.shape, pattern.num_units)
    for mine, theirs in zip((index.t_crow, index.t_rows, index.t_perm), pattern.transposed(), strict=True):
        assert torch.equal(mine.int(), theirs)


def test_an_index_owns_its_memory():
    pattern = CASES[0].pattern()
    index = Index.of(pattern)
    index.crow.zero_()
    assert int(pattern.crow_indices[-1]) == pattern.num_units


def test_scatter_and_gather_of_the_tests_are_inverse():
    p = problem(CASES[22])
    assert torch.equal(p.gather(scatter(p.values, p.pattern)), p.values)
