"""The C kernels by themselves, through their C interface, against float64 dense arithmetic in numpy."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch  # before the library: both then use the OpenMP runtime that torch brought

ROOT = Path(__file__).resolve().parents[1]


def find_library() -> Path | None:
    """RAREFY_LIBRARY, else the newest of the package's and the standalone build's copy."""
    if named := os.environ.get("RAREFY_LIBRARY"):
        return Path(named)
    found = [ROOT / "src" / "rarefy" / "librarefy_kernels.so", ROOT / "build" / "librarefy_kernels.so"]
    for entry in sys.path:
        found.append(Path(entry) / "rarefy" / "librarefy_kernels.so")
    return max((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)


LIBRARY = find_library()
if LIBRARY is None:
    pytest.skip("the native kernels are not built", allow_module_level=True)
LIB = ctypes.CDLL(str(LIBRARY))

BAD_ARGUMENT, UNSUPPORTED_BLOCK, NO_ISA = -1, -2, -4
P, I64 = ctypes.c_void_p, ctypes.c_int64
EPS = float(np.finfo(np.float32).eps)


class CPattern(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("out_features", "in_features", "block_rows", "block_cols", "num_units")),
        *((name, P) for name in ("crow", "cols", "t_crow", "t_rows", "t_perm")),
        ("index_bytes", ctypes.c_int32),
    ]


PATTERN = ctypes.POINTER(CPattern)
for name, result, arguments in [
    ("isa", ctypes.c_char_p, []),
    ("isas", ctypes.c_char_p, []),
    ("set_isa", ctypes.c_int, [ctypes.c_char_p]),
    ("supports", ctypes.c_int, [I64, I64]),
    ("spmm_f32", ctypes.c_int, [PATTERN, P, P, P, P, I64, ctypes.c_int]),
    ("backward_f32", ctypes.c_int, [PATTERN, P, P, P, P, P, P, I64, ctypes.c_int]),
    ("spmm_bf16", ctypes.c_int, [PATTERN, P, P, P, P, I64, ctypes.c_int]),
    ("backward_bf16", ctypes.c_int, [PATTERN, P, P, P, P, P, P, I64, ctypes.c_int]),
    ("mlp_forward", ctypes.c_int, [P, P, P, P, I64, ctypes.c_int]),
    ("mlp_backward", ctypes.c_int, [P, P, P, P, P, P, I64, ctypes.c_int]),
    ("transpose", ctypes.c_int, [I64, I64, P, P, P, P, P, ctypes.c_int32]),
    ("grow_new", P, [I64]),
    ("grow_scan_f32", ctypes.c_int, [P, PATTERN, P, I64, I64, ctypes.c_int]),
    ("grow_finish", I64, [P, P, P, P]),
    ("grow_free", None, [P]),
    ("workspace_bytes", I64, []),
    ("workspace_release", None, []),
]:
    function = getattr(LIB, f"rarefy_{name}")
    function.restype, function.argtypes = result, arguments

ISAS = LIB.rarefy_isas().decode().split(",")
BLOCKS = [(1, 1), (4, 1), (8, 1), (4, 4), (8, 8), (16, 16)]


def rounds_values(isa: str, block: tuple[int, int], batch: int) -> bool:
    """Whether products of bf16 activations round the values to bf16, too: AMX for some blocks, AVX512_BF16 for all."""
    if isa == "amx":
        return block in ((8, 8), (16, 16)) and batch >= 64
    return isa == "avx512bf16" and batch >= 192


def at(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Sparse:
    """A boolean map of units as the C interface wants it. Keeps the arrays alive that `c` points to."""

    def __init__(self, units: np.ndarray, block: tuple[int, int], index_bytes: int) -> None:
        self.units, self.block = units, block
        rows, cols = units.shape
        index = np.uint16 if index_bytes == 2 else np.int32
        self.crow = np.concatenate([[0], np.cumsum(units.sum(1))]).astype(np.int32)
        self.cols = np.nonzero(units)[1].astype(index)
        self.t_crow = np.full(cols + 1, -1, np.int32)
        self.t_rows = np.zeros(len(self.cols), index)
        self.t_perm = np.zeros(len(self.cols), np.int32)
        arrays = (self.crow, self.cols, self.t_crow, self.t_rows, self.t_perm)
        assert LIB.rarefy_transpose(rows, cols, *map(at, arrays), index_bytes) == 0
        self.c = CPattern(rows * block[0], cols * block[1], *block, len(self.cols), *map(at, arrays), index_bytes)

    def dense(self, values: np.ndarray) -> np.ndarray:
        """(out, in) float64 from values (K, br, bc)."""
        rows, cols = self.units.shape
        w = np.zeros((rows, cols, *self.block))
        w[self.units] = values
        return w.transpose(0, 2, 1, 3).reshape(rows * self.block[0], cols * self.block[1])

    def gather(self, w: np.ndarray) -> np.ndarray:
        """The reverse of `dense`: (K, br, bc)."""
        rows, cols = self.units.shape
        return w.reshape(rows, self.block[0], cols, self.block[1]).transpose(0, 2, 1, 3)[self.units]


@dataclass(frozen=True)
class Case:
    """Sizes in units of the block."""

    rows: int
    cols: int
    density: float
    batch: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}-d{self.density}-b{self.batch}"


CASES = [
    Case(7, 5, 0.5, 3),
    Case(33, 17, 0.2, 1),
    Case(1, 1, 1.0, 1),
    Case(1, 40, 0.3, 17),
    Case(40, 1, 0.3, 16),
    Case(64, 64, 1.0, 33),
    Case(64, 48, 0.0, 20),
    Case(19, 23, 0.1, 0),
    Case(31, 67, 0.1, 64),
    Case(130, 70, 0.05, 65),
    Case(70, 257, 0.1, 129),
    Case(257, 130, 0.1, 300),
    Case(0, 5, 0.5, 4),
    Case(5, 0, 0.5, 4),
]
LARGE = [  # several panels, several tiles of columns, several chunks of rows, none of them whole
    Case(300, 2600, 0.05, 200),
    Case(2600, 300, 0.05, 200),
    Case(700, 600, 0.1, 515),
    Case(96, 3000, 0.3, 131),
    Case(300, 400, 0.9, 260),
    Case(300, 400, 0.0, 130),
    Case(1, 900, 0.5, 130),
    Case(900, 1, 0.5, 130),
]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make(case: Case, block: tuple[int, int] = (1, 1), index_bytes: int = 4, uneven: bool = False):
    """A pattern, values, x, dy, bias; some rows and columns are empty, and one row is full if `uneven`."""
    rng = np.random.default_rng(case.seed)
    units = rng.random((case.rows, case.cols)) < case.density
    if case.density < 1 and case.rows > 4 and case.cols > 4:
        units[[1, -1]] = False
        units[:, [0, 3]] = False
    if uneven:
        units[case.rows // 2] = True
        units[:, case.cols // 2] = True
    sparse = Sparse(units, block, index_bytes)
    values = rng.standard_normal((len(sparse.cols), *block), np.float32)
    x = rng.standard_normal((case.batch, case.cols * block[1]), np.float32)
    dy = rng.standard_normal((case.batch, case.rows * block[0]), np.float32)
    bias = rng.standard_normal(case.rows * block[0], np.float32)
    return sparse, values, x, dy, bias


def guarded(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An output full of NaN, at an address that is 4-byte aligned only, and the guard cells around it."""
    size = int(np.prod(shape))
    room = np.full(size + 33, np.nan, np.float32)
    return room[17 : 17 + size].reshape(shape), room


def check(out: np.ndarray, room: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """|out - exact| <= (terms + 2) eps sum|a||b|, the bound for a sum of `terms` products in any order."""
    assert np.isnan(room[:17]).all() and np.isnan(room[17 + out.size :]).all(), "written outside the output"
    assert out.shape == exact.shape
    assert (np.abs(out - exact) <= (terms + 2) * EPS * magnitude).all()


class Problem:
    """One case: operands, and the exact results with the sum of magnitudes that bounds each one's rounding error."""

    def __init__(self, case: Case, block: tuple[int, int] = (1, 1), index_bytes: int = 4, uneven: bool = False) -> None:
        self.sparse, self.values, self.x, self.dy, self.bias = make(case, block, index_bytes, uneven)
        self.batch = case.batch
        w, x, dy = (torch.from_numpy(a).double() for a in (self.sparse.dense(self.values), self.x, self.dy))
        bias = torch.from_numpy(self.bias).double()
        gather = self.sparse.gather
        self.exact = {"y": x @ w.T, "dx": dy @ w, "dvalues": dy.T @ x, "dbias": dy.sum(0)}
        w, x, dy = w.abs(), x.abs(), dy.abs()
        self.magnitude = {"y": x @ w.T + bias.abs(), "dx": dy @ w, "dvalues": dy.T @ x, "dbias": dy.sum(0)}
        for results in (self.exact, self.magnitude):
            results["dvalues"] = torch.from_numpy(gather(results["dvalues"].numpy()))
        self.terms = {"y": w.shape[1] + 1, "dx": w.shape[0], "dvalues": case.batch, "dbias": case.batch}

    def output(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return guarded(tuple(self.exact[name].shape))

    def check(self, name: str, out: np.ndarray, room: np.ndarray, exact: torch.Tensor | None = None) -> None:
        exact = self.exact[name] if exact is None else exact
        check(out, room, exact.numpy(), self.magnitude[name].numpy(), self.terms[name])

    def forward(self, threads: int, with_bias: bool = True) -> np.ndarray:
        y, room = self.output("y")
        bias = self.bias if with_bias else None
        pattern = ctypes.byref(self.sparse.c)
        args = (at(self.values), at(self.x), at(bias), at(y), self.batch, threads)
        assert LIB.rarefy_spmm_f32(pattern, *args) == 0
        self.check("y", y, room, self.exact["y"] + (torch.from_numpy(bias).double() if bias is not None else 0))
        return y

    def backward(self, threads: int, *names: str) -> list[np.ndarray]:
        """rarefy_backward_f32 for the outputs named."""
        outputs = {name: self.output(name) for name in names}
        into = [at(outputs[name][0]) if name in names else None for name in ("dx", "dvalues", "dbias")]
        args = (at(self.values), at(self.dy), at(self.x), *into, self.batch, threads)
        assert LIB.rarefy_backward_f32(ctypes.byref(self.sparse.c), *args) == 0
        for name, (out, room) in outputs.items():
            self.check(name, out, room)
        return [out for out, _ in outputs.values()]

    def all(self, threads: int) -> list[np.ndarray]:
        """Every function of the interface, with and without what is optional, each checked."""
        pattern = ctypes.byref(self.sparse.c)
        outputs = [self.forward(threads), self.forward(threads, with_bias=False)]
        dx, room = self.output("dx")
        args = (at(self.values), at(self.dy), None, at(dx), None, None, self.batch, threads)
        assert LIB.rarefy_backward_f32(pattern, *args) == 0
        self.check("dx", dx, room)
        for with_bias in (True, False):
            (dvalues, room), (dbias, bias_room) = self.output("dvalues"), self.output("dbias")
            into = (None, at(dvalues), at(dbias) if with_bias else None)
            args = (None, at(self.dy), at(self.x), *into, self.batch, threads)
            assert LIB.rarefy_backward_f32(pattern, *args) == 0
            self.check("dvalues", dvalues, room)
            if with_bias:
                self.check("dbias", dbias, bias_room)
        for names in (["dx", "dbias"], ["dvalues"], ["dbias"], ["dx", "dvalues"]):
            self.backward(threads, *names)
        return outputs + self.backward(threads, "dx", "dvalues", "dbias")


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this CPU and build have; the one in use before is restored."""
    before = LIB.rarefy_isa()
    assert LIB.rarefy_set_isa(request.param.encode()) == 0
    assert LIB.rarefy_isa().decode() == request.param
    yield request.param
    LIB.rarefy_set_isa(before)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_dense(isa: str, case: Case, block: tuple[int, int]) -> None:
    Problem(case, block).all(threads=2)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_kernels_match_dense(isa: str, case: Case) -> None:
    Problem(case, index_bytes=2).all(threads=2)


@pytest.mark.parametrize("block", BLOCKS[1:], ids=str)
def test_large_blocks_match_dense(isa: str, block: tuple[int, int]) -> None:
    Problem(Case(ceil_div(400, block[0]), ceil_div(900, block[1]), 0.1, 260), block, index_bytes=2).all(threads=2)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("batch", range(1, 18))
def test_few_tokens_match_dense_with_the_same_bits_whatever_the_threads(isa: str, batch: int, block: tuple[int, int]):
    """Every number of tokens that has a kernel of its own, and rows shorter and longer than its strides."""
    for rows, cols, density in ((37, 91, 0.4), (60, 300, 0.05)):
        case = Case(ceil_div(rows, block[0]) + 4, ceil_div(cols, block[1]) + 4, density, batch)
        for uneven in (False, True):
            first = None
            for index_bytes, threads in ((2, 1), (4, 1), (2, 2), (4, 3)):
                problem = Problem(case, block, index_bytes, uneven)
                for with_bias in (True, False):
                    y = problem.forward(threads, with_bias)
                    again = problem.forward(threads, with_bias)
                    assert np.array_equal(y, again)
                    first = {} if first is None else first
                    assert np.array_equal(y, first.setdefault(with_bias, y))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 11])
def test_few_tokens_keep_what_is_not_finite_to_itself(isa: str, batch: int) -> None:
    """An infinite input reaches its token and the rows that read it, and no other; padding lanes reach no one."""
    sparse, values, x, _, _ = make(Case(20, 40, 0.4, batch))
    x[-1, 7] = np.inf
    y = np.empty((batch, 20), np.float32)
    assert LIB.rarefy_spmm_f32(ctypes.byref(sparse.c), at(values), at(x), None, at(y), batch, 2) == 0
    assert np.isfinite(y[:-1]).all()
    assert (np.isfinite(y[-1]) == ~sparse.units[:, 7]).all()


@pytest.mark.parametrize("block", [(1, 1), (4, 4)], ids=str)
def test_uneven_rows(isa: str, block: tuple[int, int]) -> None:
    Problem(Case(150, 260, 0.03, 300), block, index_bytes=2, uneven=True).all(threads=3)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("case", [Case(257, 130, 0.1, 10), Case(513, 300, 0.1, 270)], ids=str)
def test_same_bits_whatever_the_threads_and_index_width(isa: str, case: Case, block: tuple[int, int]) -> None:
    first = Problem(case, block, index_bytes=2).all(threads=1)
    for index_bytes, threads in ((2, 1), (4, 1), (2, 2), (4, 3)):
        problem = Problem(case, block, index_bytes)
        again = [problem.forward(threads), problem.forward(threads, with_bias=False)]
        again += problem.backward(threads, "dx", "dvalues", "dbias")
        for a, b in zip(first, again, strict=True):
            assert np.array_equal(a, b)


def test_columns_beyond_uint16(isa: str) -> None:
    Problem(Case(3, 70_000, 0.01, 5)).all(threads=2)
    Problem(Case(3, 70_000, 0.01, 150)).all(threads=2)


def test_padding_tokens_stay_out_of_the_gradient(isa: str) -> None:
    """A value that is not finite in the last token reaches only what it must."""
    sparse, values, x, dy, _ = make(Case(20, 30, 0.4, 70))
    dy[-1, 4] = np.inf
    dvalues = np.empty_like(values)
    args = (at(values), at(dy), at(x), None, at(dvalues), None, 70, 2)
    assert LIB.rarefy_backward_f32(ctypes.byref(sparse.c), *args) == 0
    finite = np.isfinite(dvalues[:, 0, 0])
    assert (finite == (np.nonzero(sparse.units)[0] != 4)).all()


# -- bfloat16 ---------------------------------------------------------------------------------------------------------

HALF_ULP = 2.0**-8  # of a number with 8 significant bits, as a part of it


def narrow(array: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, by torch."""
    return torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("batch", [1, 20, 33, 64, 200, 260])
def test_bf16_activations_match_dense(isa: str, batch: int, block: tuple[int, int]) -> None:
    """Exact in fp32, and rounded once when stored; gradients of values and bias are fp32."""
    problem = Problem(Case(37, 29, 0.2, batch), block)
    problem.x, problem.dy = widen(narrow(problem.x)), widen(narrow(problem.dy))
    x, dy = narrow(problem.x), narrow(problem.dy)
    w = torch.from_numpy(problem.sparse.dense(problem.values))
    x64, dy64 = torch.from_numpy(problem.x).double(), torch.from_numpy(problem.dy).double()
    y, dx = np.full((batch, w.shape[0]), 0x7FC1, np.uint16), np.full((batch, w.shape[1]), 0x7FC1, np.uint16)
    dvalues, dbias = np.empty_like(problem.values), np.empty_like(problem.bias)
    pattern = ctypes.byref(problem.sparse.c)
    assert LIB.rarefy_spmm_bf16(pattern, at(problem.values), at(x), at(problem.bias), at(y), batch, 2) == 0
    args = (at(problem.values), at(dy), at(x), at(dx), at(dvalues), at(dbias), batch, 2)
    assert LIB.rarefy_backward_bf16(pattern, *args) == 0
    bias = torch.from_numpy(problem.bias).double()
    exact = {
        "y": (x64 @ w.T + bias, x64.abs() @ w.abs().T + bias.abs(), widen(y)),
        "dx": (dy64 @ w, dy64.abs() @ w.abs(), widen(dx)),
        "dvalues": (*(problem.sparse.gather(m.numpy()) for m in (dy64.T @ x64, dy64.abs().T @ x64.abs())), dvalues),
        "dbias": (dy64.sum(0), dy64.abs().sum(0), dbias),
    }
    for name, (truth, magnitude, found) in exact.items():
        bound = (problem.terms[name] + 2) * EPS * np.asarray(magnitude)
        if name in ("y", "dx"):
            if rounds_values(isa, block, batch):
                bound += HALF_ULP * np.asarray(magnitude)
            bound += HALF_ULP * (np.abs(np.asarray(truth)) + bound)
        assert (np.abs(found - np.asarray(truth)) <= bound).all(), name


@pytest.mark.parametrize("batch", [1, 20, 64, 200])
def test_bf16_stores_round_to_nearest_even(isa: str, batch: int) -> None:
    """Each value, times one, comes out as torch rounds it: ties, carries into the exponent, infinities, and NaN."""
    rng = np.random.default_rng(0)
    special = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3FFFFFFF, 0x7F7FFFFF, 0xFF7F8000, 0x7F800000]
    special += [0xFF800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x00800000, 0x80000000]
    words = np.concatenate([np.array(special, np.uint32), rng.integers(0x00800000, 0x7F800000, 200, np.uint32)])
    values = words.view(np.float32).reshape(-1, 1, 1).copy()
    sparse = Sparse(np.ones((len(values), 1), bool), (1, 1), 2)
    ones, y = narrow(np.ones((batch, 1), np.float32)), np.zeros((batch, len(values)), np.uint16)
    assert LIB.rarefy_spmm_bf16(ctypes.byref(sparse.c), at(values), at(ones), None, at(y), batch, 2) == 0
    wanted = np.broadcast_to(widen(narrow(values.reshape(1, -1))), y.shape)
    # NaN is any NaN, and a sum that begins with 0 has no -0.
    np.testing.assert_array_equal(widen(y), wanted)


# -- MLPs -------------------------------------------------------------------------------------------------------------


class CLayer(ctypes.Structure):
    _fields_ = [("pattern", PATTERN), ("values", P), ("bias", P)]


class CMlp(ctypes.Structure):
    _fields_ = [
        *((name, CLayer) for name in ("gate", "up", "down")),
        *((name, ctypes.c_int32) for name in ("activation", "half_rows", "half_saved")),
    ]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_mlps_stay_inside_their_outputs_and_refuse_bad_arguments(isa: str, gated: bool) -> None:
    """Every output lies between guards; what is optional may be missing. Their values are checked in test_mlp.py."""
    batch, features, hidden, out = 70, 24, 40, 16
    layers, values = {}, {}
    for seed, (name, rows, cols) in enumerate(
        (("gate", hidden, features), ("up", hidden, features), ("down", out, hidden))
    ):
        layers[name], values[name], *_ = make(Case(rows, cols, 0.3, 1, seed=seed))
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((batch, features), np.float32), rng.standard_normal((batch, out), np.float32)
    parts = [
        CLayer(ctypes.pointer(layers[name].c), at(values[name]), None) if gated or name != "gate" else CLayer()
        for name in layers
    ]
    mlp = CMlp(*parts, 1, 0, 0)
    saved, saved_room = guarded((2, hidden * (1 + gated), 64))
    y, y_room = guarded((batch, out))

    def forward(batch: int = batch, **change: int) -> int:
        for name, value in change.items():
            setattr(mlp, name, value)
        return LIB.rarefy_mlp_forward(ctypes.byref(mlp), at(x), at(y), at(saved), batch, 2)

    assert forward(activation=5) == BAD_ARGUMENT and forward(activation=-1) == BAD_ARGUMENT
    assert forward(batch=-1, activation=1) == BAD_ARGUMENT
    assert np.isnan(y).all()
    assert forward() == 0 and np.isfinite(y).all()
    gradients = {name: guarded(values[name].shape) for name in layers}
    pairs = np.array([[at(gradients[name][0]), 0] for name in layers], np.uintp)  # values; no bias

    def backward(dx: np.ndarray | None) -> list[np.ndarray]:
        args = (at(dy), at(x), at(saved), at(dx), at(pairs), batch, 2)
        assert LIB.rarefy_mlp_backward(ctypes.byref(mlp), *args) == 0
        return [gradients[name][0].copy() for name in layers if gated or name != "gate"]

    dx, dx_room = guarded((batch, features))
    with_dx, without = backward(dx), backward(None)
    assert np.isfinite(dx).all() and all(np.isfinite(gradient).all() for gradient in with_dx)
    for a, b in zip(with_dx, without, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for array, room in ((y, y_room), (saved, saved_room), (dx, dx_room), *gradients.values()):
        assert np.isnan(room[:17]).all() and np.isnan(room[17 + array.size :]).all()
    pairs[1] = 0
    args = (at(dy), at(x), at(saved), at(dx), at(pairs), batch, 2)
    assert LIB.rarefy_mlp_backward(ctypes.byref(mlp), *args) == BAD_ARGUMENT
    mlp.down.pattern = ctypes.pointer(layers["up"].c)  # whose inputs are not the hidden features
    assert forward() == BAD_ARGUMENT


def test_the_callers_denormals_survive(isa: str) -> None:
    """Kernels flush denormals while they run, and leave the caller's arithmetic as it was."""
    Problem(Case(20, 30, 0.4, 270)).all(threads=1)
    tiny = np.float32(1e-40) * np.ones(4, np.float32)
    assert (tiny * np.float32(0.5) > 0).all()


def test_concurrent_callers_agree() -> None:
    problem = Problem(Case(200, 300, 0.1, 270))
    alone = [problem.forward(1), *problem.backward(1, "dx", "dvalues", "dbias")]
    results: list[list[np.ndarray]] = []

    def call() -> None:
        for _ in range(5):
            results.append([problem.forward(2), *problem.backward(2, "dx", "dvalues", "dbias")])

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 20
    for outputs in results:
        assert all(np.array_equal(a, b) for a, b in zip(alone, outputs, strict=True))


def test_workspace_is_kept_and_released() -> None:
    Problem(Case(200, 300, 0.1, 150)).all(threads=1)
    assert LIB.rarefy_workspace_bytes() > 0
    LIB.rarefy_workspace_release()
    assert LIB.rarefy_workspace_bytes() == 0
    Problem(Case(200, 300, 0.1, 150)).all(threads=1)


@pytest.mark.parametrize("index_bytes", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transpose(case: Case, index_bytes: int) -> None:
    sparse = make(case, index_bytes=index_bytes)[0]
    rows, cols = np.nonzero(sparse.units)
    order = np.lexsort((rows, cols))
    assert np.array_equal(sparse.t_perm, order)
    assert np.array_equal(sparse.t_rows, rows[order])
    assert np.array_equal(sparse.t_crow, np.concatenate([[0], np.cumsum(sparse.units.sum(0))]))


def test_transpose_refuses_a_column_out_of_range() -> None:
    sparse = make(Case(7, 5, 0.5, 3))[0]
    sparse.cols[0] = 5
    arrays = (sparse.crow, sparse.cols, sparse.t_crow, sparse.t_rows, sparse.t_perm)
    assert LIB.rarefy_transpose(7, 5, *map(at, arrays), 4) == BAD_ARGUMENT


def grow(sparse: Sparse, gradient: np.ndarray, k: int, tiles: list[tuple[int, int]], threads: int):
    """(unit indices, scores, number not finite) after scanning the given (first unit row, number of unit rows)."""
    br = sparse.block[0]
    selection = LIB.rarefy_grow_new(k)
    for first, count in tiles:
        tile = np.ascontiguousarray(gradient[first * br : (first + count) * br])
        args = (selection, ctypes.byref(sparse.c), at(tile), first, count, threads)
        assert LIB.rarefy_grow_scan_f32(*args) == 0
    units, scores, bad = np.full(k, -1, np.int64), np.full(k, np.nan, np.float32), np.zeros(1, np.int64)
    found = LIB.rarefy_grow_finish(selection, at(units), at(scores), at(bad))
    LIB.rarefy_grow_free(selection)
    return units[:found], scores[:found], int(bad[0])


def best_absent(sparse: Sparse, gradient: np.ndarray, k: int):
    """The specification of `grow`, in numpy."""
    rows, cols = sparse.units.shape
    br, bc = sparse.block
    blocks = np.abs(gradient).reshape(rows, br, cols, bc).transpose(0, 2, 1, 3).reshape(rows * cols, br * bc)
    score = np.zeros(rows * cols, np.float32)
    for entry in range(br * bc):
        score = (score + blocks[:, entry]).astype(np.float32)
    score = (score / np.float32(br * bc)).astype(np.float32)
    absent = ~sparse.units.reshape(-1)
    bad = int((absent & ~np.isfinite(score)).sum())
    candidates = np.nonzero(absent & np.isfinite(score))[0]
    order = candidates[np.lexsort((candidates, -score[candidates].astype(np.float64)))][:k]
    return order, score[order], bad


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("k", [0, 1, 50, 700, 100_000])
def test_grow_is_exact(k: int, block: tuple[int, int], ties: bool) -> None:
    rng = np.random.default_rng(k)
    rows, cols = 61, 83
    sparse = Sparse(rng.random((rows, cols)) < 0.1, block, 2)
    gradient = rng.standard_normal((rows * block[0], cols * block[1]), np.float32)
    if ties:
        gradient = np.round(gradient)
    gradient[5, 7], gradient[6, 6], gradient[-1, -1] = np.nan, np.inf, -np.inf
    expected = best_absent(sparse, gradient, k)
    tiles = [(first, min(8, rows - first)) for first in range(0, rows, 8)]
    for order in (tiles, tiles[::-1], [tiles[i] for i in rng.permutation(len(tiles))], [(0, rows)]):
        for threads in (1, 2, 5):
            units, scores, bad = grow(sparse, gradient, k, order, threads)
            assert np.array_equal(units, expected[0])
            assert np.array_equal(scores, expected[1])
            assert bad == expected[2]


def test_grow_with_full_buffers_and_ties_across_compactions() -> None:
    """Many more candidates than the buffer holds, in ascending order of score and all equal."""
    sparse = Sparse(np.zeros((200, 500), bool), (1, 1), 4)
    rising = np.arange(100_000, dtype=np.float32).reshape(200, 500)
    units, _, _ = grow(sparse, rising, 300, [(r, 10) for r in range(0, 200, 10)], 2)
    assert np.array_equal(units, np.arange(99_999, 99_699, -1))
    units, _, _ = grow(sparse, np.ones_like(rising), 300, [(r, 10) for r in range(190, -1, -10)], 2)
    assert np.array_equal(units, np.arange(300))
    units, scores, _ = grow(sparse, np.zeros_like(rising), 300, [(0, 200)], 2)
    assert np.array_equal(units, np.arange(300)) and (scores == 0).all()


def test_bad_arguments_are_refused() -> None:
    sparse, values, x, _, _ = make(Case(8, 12, 0.5, 4))
    y = np.empty((4, 8), np.float32)

    def call(**changes: int) -> int:
        c = CPattern.from_buffer_copy(sparse.c)
        batch = changes.pop("batch", 4)
        for field, value in changes.items():
            setattr(c, field, value)
        return LIB.rarefy_spmm_f32(ctypes.byref(c), at(values), at(x), None, at(y), batch, 1)

    assert call() == 0
    assert call(batch=-1) == BAD_ARGUMENT
    assert call(index_bytes=8) == BAD_ARGUMENT
    assert call(num_units=len(values) + 1) == BAD_ARGUMENT
    assert call(block_rows=3) == BAD_ARGUMENT
    assert call(block_rows=0) == BAD_ARGUMENT
    assert call(block_cols=3, num_units=len(values)) == UNSUPPORTED_BLOCK
    assert LIB.rarefy_supports(4, 4) == 1 and LIB.rarefy_supports(3, 4) == 0
    assert LIB.rarefy_grow_new(-1) is None


def test_unknown_isa_is_refused_and_named_in_the_environment() -> None:
    before = LIB.rarefy_isa()
    assert LIB.rarefy_set_isa(b"abacus") == NO_ISA
    assert LIB.rarefy_isa() == before
    script = (
        "import ctypes, sys, torch; lib = ctypes.CDLL(sys.argv[1]); lib.rarefy_isa.restype = ctypes.c_char_p;"
        "print(lib.rarefy_isa().decode(), lib.rarefy_spmm_f32(None, None, None, None, None, ctypes.c_int64(0), 1))"
    )
    for wanted, printed in (("abacus", f"unavailable {NO_ISA}"), ("portable", f"portable {BAD_ARGUMENT}")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(LIBRARY)],
            env={**os.environ, "RAREFY_ISA": wanted},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == printed


COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "c++", "g++", "clang++"))), None)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a compiler on Linux")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the compiler would run under the sanitizers too")
@pytest.mark.parametrize("check", ["check_kernels", "check_images", "check_passes"])
def test_the_program_that_checks_the_kernels_by_itself(tmp_path: Path, check: str) -> None:
    """Other machines, real and emulated, run it alone (`make neon`): here it must build, pass, and be able to fail."""
    assert COMPILER is not None and LIBRARY is not None
    program = tmp_path / check
    source = ROOT / "csrc" / "tests" / f"{check}.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, source, LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}", "-o", program], check=True)
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([program, *ISAS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(f"\n{isa} " in done.stdout for isa in ISAS)
    done = subprocess.run([program, "abacus"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "abacus is not among them" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_is_loaded() -> None:
    Problem(Case(20, 30, 0.4, 270)).all(threads=2)
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = {path for path in paths if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1
