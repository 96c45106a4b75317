"""Threads get equal work from skewed patterns: what a chunk may hold at most, and results that no partition changes."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.ops import Index, library
from rarefy.pattern import Pattern

ROOT = Path(__file__).resolve().parents[1]
EPS = torch.finfo(torch.float32).eps
spec = importlib.util.spec_from_file_location("balance", ROOT / "tools" / "balance.py")
assert spec is not None and spec.loader is not None
balance = importlib.util.module_from_spec(spec)
spec.loader.exec_module(balance)


@pytest.fixture(scope="module")
def cut_chunks(tmp_path_factory):
    """The kernels' own function: (pointers, most rows a chunk, parts) to the first row of each chunk and the end."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("partition") / "partition.so"
    source = ROOT / "csrc" / "tests" / "partition.cpp"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", built], check=True)
    function = ctypes.CDLL(str(built)).cut_chunks
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]

    def call(ptr: np.ndarray, most: int, parts: int) -> np.ndarray:
        arguments = (ptr.ctypes.data, len(ptr) - 1, most, parts)
        first = np.full(function(*arguments, None) + 1, -1, np.int32)
        assert function(*arguments, first.ctypes.data) == len(first) - 1  # counted and written alike
        return first

    return call


@given(
    counts=st.lists(st.integers(0, 8) | st.integers(0, 5000), max_size=200),
    most=st.integers(1, 64),
    parts=st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_a_chunk_holds_at_most_its_share_and_one_row(cut_chunks, counts, most, parts) -> None:
    """Work is a row's units and one. No chunk holds more than a `parts`th of it plus less than its last row's."""
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    first = cut_chunks(ptr, most, parts)
    assert first[0] == 0 and first[-1] == len(counts)
    sizes = np.diff(first)
    assert ((sizes >= 1) & (sizes <= most)).all()
    work = np.asarray(counts, np.int64) + 1
    share = -(-int(work.sum()) // parts)
    for begin, end in itertools.pairwise(first):
        assert work[begin : end - 1].sum() < share  # without its last row it is not full yet
    assert len(sizes) <= parts + len(counts) // most  # and no more chunks than that takes


def test_a_row_of_its_own_share_stands_alone_in_time(cut_chunks) -> None:
    """One row as heavy as all others: the others are still cut evenly around it."""
    counts = [10] * 50 + [1000] + [10] * 50
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    first = cut_chunks(ptr, 1000, 4)
    held = [int(ptr[b] - ptr[a]) for a, b in itertools.pairwise(first)]
    assert max(held) < 1000 + 530 and sum(held) == 2000
    assert sorted(held)[-2] <= 530


@st.composite
def skewed_patterns(draw) -> Pattern:
    """Patterns with a skew, of sizes that fill neither tiles nor chunks nor panels whole."""
    block = draw(st.sampled_from([1, 4]))
    rows, cols = draw(st.integers(1, 170)), draw(st.integers(1, 170))
    if draw(st.booleans()):
        rows, cols = rows * 4 // block, cols * 4 // block
    shape = (rows * block, cols * block)
    name, density = draw(st.sampled_from(sorted(balance.SKEWS))), draw(st.sampled_from([0.02, 0.1, 0.4]))
    return balance.skewed(name, shape, density, block, seed=draw(st.integers(0, 99)))


def run(pattern: Pattern, operands: tuple[torch.Tensor, ...], threads: int) -> list[torch.Tensor]:
    """Everything that a layer computes."""
    values, x, dy, bias = operands
    index = Index.of(pattern)
    ops, before = torch.ops.rarefy, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [ops.spmm(values, *index, x, bias), ops.spmm_t(values, *index, dy), ops.sddmm(*index, dy, x)]
        return [*results, *ops.spmm_backward(values, *index, dy, x, [True, True, True])]
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not library.isas(), reason="the native kernels are not built")
@given(
    pattern=skewed_patterns(), tokens=st.sampled_from([5, 70, 200, 330]), isa=st.sampled_from(library.isas() or ["-"])
)
@settings(max_examples=60, deadline=None)
def test_skewed_patterns_match_dense_bit_for_bit_whatever_the_threads(pattern, tokens, isa) -> None:
    """Within rounding of float64, equal from run to run and from one thread count to another."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (pattern.num_units, *(() if pattern.block == (1, 1) else pattern.block))
    values, x = torch.randn(shape, generator=generator), torch.randn(tokens, pattern.shape[1], generator=generator)
    dy, bias = (
        torch.randn(tokens, pattern.shape[0], generator=generator),
        torch.randn(pattern.shape[0], generator=generator),
    )
    before = library.isa()
    library.set_isa(isa)
    try:
        results = run(pattern, (values, x, dy, bias), 2)
        for threads in (2, 1, 3):
            for a, b in zip(results, run(pattern, (values, x, dy, bias), threads), strict=True):
                assert torch.equal(a, b)
    finally:
        library.set_isa(str(before))

    mask = pattern.to_mask()
    rows, cols = pattern.num_unit_rows, pattern.num_unit_cols

    def to_dense(v: torch.Tensor) -> torch.Tensor:
        w = torch.zeros(rows * cols, *pattern.block, dtype=torch.float64)
        w[pattern.unit_indices()] = v.double().view(-1, *pattern.block)
        return w.view(rows, cols, *pattern.block).transpose(1, 2).reshape(pattern.shape)

    def products(w, x, dy, bias) -> list[torch.Tensor]:
        dw = torch.where(mask, dy.T @ x, 0.0)
        return [x @ w.T + bias, dy @ w, dw, dy @ w, dw, dy.sum(0)]

    exact = [to_dense(values), x.double(), dy.double(), bias.double()]
    bounds = products(*(a.abs() for a in exact))
    terms = [pattern.shape[1] + 1, pattern.shape[0], tokens, pattern.shape[0], tokens, tokens]
    for at, (out, truth, bound, n) in enumerate(zip(results, products(*exact), bounds, terms, strict=True)):
        wide = to_dense(out) if at in (2, 4) else out.double()
        assert ((wide - truth).abs() <= (n + 2) * EPS * bound).all()
