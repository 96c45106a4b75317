"""The C++ kernels behind the four operations: fp32 on CPU, with activations in fp32 or bf16; others are converted."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.library import INT64, POINTER, call, load
from rarefy.ops.memory import empty

if TYPE_CHECKING:
    from rarefy.ops.mlp import Matrices


SAVED_TOKENS = 64
"""RAREFY_SAVED_TOKENS of csrc/rarefy.h."""


class _CPattern(ctypes.Structure):
    """`rarefy_pattern` of csrc/rarefy.h."""

    _fields_ = [
        *((name, INT64) for name in ("out_features", "in_features", "block_rows", "block_cols", "num_units")),
        *((name, POINTER) for name in ("crow", "cols", "t_crow", "t_rows", "t_perm")),
        ("index_bytes", ctypes.c_int32),
    ]


@functools.cache
def _supports(block_rows: int, block_cols: int) -> bool:
    library = load()
    return isinstance(library, ctypes.CDLL) and bool(library.rarefy_supports(block_rows, block_cols))


def why_not(dtype: torch.dtype, device: torch.device, block: list[int]) -> str | None:
    """Why the kernels cannot run such values; None when they can."""
    library = load()
    if isinstance(library, str):
        return library
    if device.type != "cpu":
        return f"the compiled kernels run on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compiled kernels compute in float32, not {dtype}"
    if not _supports(block[0], block[1]):
        return f"there is no compiled kernel for blocks of {block[0]}x{block[1]}"
    return None


def c_pattern(index: Index) -> _CPattern:
    """Pointers into `index`, which must outlive the call."""
    crow, cols, t_crow, t_rows, t_perm, block = index
    assert crow.is_contiguous() and cols.is_contiguous()
    assert t_crow.is_contiguous() and t_rows.is_contiguous() and t_perm.is_contiguous()
    return _CPattern(
        (crow.shape[0] - 1) * block[0],
        (t_crow.shape[0] - 1) * block[1],
        *block,
        cols.shape[0],
        *(crow.data_ptr(), cols.data_ptr(), t_crow.data_ptr(), t_rows.data_ptr(), t_perm.data_ptr()),
        cols.itemsize,
    )


def _f32(tensor: Tensor) -> Tensor:
    """Contiguous fp32: what the kernels read. What already is comes back as it is: at one token every call counts."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def _rows(*tensors: Tensor) -> tuple[list[Tensor], str]:
    """Activations as the kernels read them, and the suffix of the kernels that do: all bf16, or all fp32, with factors
    rounded to bf16 where `torch.set_float32_matmul_precision("medium")` allows it.
    """
    if all(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return [tensor.detach().contiguous() for tensor in tensors], "bf16"
    medium = torch.get_float32_matmul_precision() == "medium"
    return [_f32(tensor) for tensor in tensors], "medium" if medium else "f32"


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    values, bias = _f32(values), None if bias is None else _f32(bias)
    (rows,), kind = _rows(x)
    y = empty(x.shape[0], index.out_features, rows.dtype)
    arguments = (values.data_ptr(), rows.data_ptr(), _pointer(bias), y.data_ptr(), x.shape[0], torch.get_num_threads())
    call(f"rarefy_spmm_{kind}", ctypes.byref(c_pattern(index)), *arguments)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    values = _f32(values)
    (rows,), kind = _rows(dy)
    dx = empty(dy.shape[0], index.in_features, rows.dtype)
    pointers = (values.data_ptr(), rows.data_ptr(), None, dx.data_ptr(), None, None)
    call(f"rarefy_backward_{kind}", ctypes.byref(c_pattern(index)), *pointers, dy.shape[0], torch.get_num_threads())
    return dx.to(dy.dtype)


def _empty_values(index: Index) -> Tensor:
    shape = (index.num_units,) if index.block == [1, 1] else (index.num_units, *index.block)
    return torch.empty(shape, dtype=torch.float32)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    (dy_rows, x_rows), kind = _rows(dy, x)
    dvalues = _empty_values(index)
    pointers = (None, dy_rows.data_ptr(), x_rows.data_ptr(), None, dvalues.data_ptr(), None)
    call(f"rarefy_backward_{kind}", ctypes.byref(c_pattern(index)), *pointers, x.shape[0], torch.get_num_threads())
    return dvalues.to(x.dtype)


def spmm_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dvalues and dbias, each where `needs` asks for it; dy is packed once."""
    v32 = _f32(values)
    (dy_rows, x_rows), kind = _rows(dy, x)
    dx = empty(x.shape[0], x.shape[1], x_rows.dtype) if needs[0] else None
    dvalues = _empty_values(index) if needs[1] else None
    dbias = v32.new_empty(index.out_features) if needs[2] else None
    inputs = (v32.data_ptr(), dy_rows.data_ptr(), x_rows.data_ptr())
    outputs = (_pointer(dx), _pointer(dvalues), _pointer(dbias))
    name, pattern = f"rarefy_backward_{kind}", c_pattern(index)
    call(name, ctypes.byref(pattern), *inputs, *outputs, x.shape[0], torch.get_num_threads())
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dvalues is None else dvalues.to(values.dtype),
        None if dbias is None else dbias.to(values.dtype),
    )


class _CLayer(ctypes.Structure):
    """`rarefy_layer` of csrc/rarefy.h."""

    _fields_ = [("pattern", ctypes.POINTER(_CPattern)), ("values", POINTER), ("bias", POINTER)]


class _CMlp(ctypes.Structure):
    """`rarefy_mlp` of csrc/rarefy.h."""

    _fields_ = [
        *((name, _CLayer) for name in ("gate", "up", "down")),
        *((name, ctypes.c_int32) for name in ("activation", "half_rows", "half_saved")),
    ]


class _CMlpGradients(ctypes.Structure):
    """`rarefy_mlp_gradients` of csrc/rarefy.h: values and bias of gate, up and down."""

    _fields_ = [(name, POINTER * 2) for name in ("gate", "up", "down")]


def _c_mlp(m: Matrices, biases: Sequence[Tensor | None], activation: int, rows: Tensor, saved: torch.dtype) -> _CMlp:
    """Pointers into the matrices and biases (fp32), which must outlive the call."""
    layers = [
        _CLayer(ctypes.pointer(c_pattern(index)), values.data_ptr(), _pointer(bias))
        for (values, index), bias in zip(m, biases, strict=True)
    ]
    gate = [_CLayer()] if len(m) == 2 else []
    return _CMlp(*gate, *layers, activation, rows.dtype == torch.bfloat16, saved == torch.bfloat16)


def mlp(
    m: Matrices, x: Tensor, biases: Sequence[Tensor | None], activation: int, saved: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.mlp`; fp32 values, x in fp32 or bf16."""
    (rows,), _ = _rows(x)
    biases = [None if bias is None else _f32(bias) for bias in biases]
    m = tuple((_f32(values), index) for values, index in m)
    batch, features = x.shape[0], sum(index.out_features for _, index in m[:-1])
    y = empty(batch, m[-1][1].out_features, rows.dtype)
    groups = -(-batch // SAVED_TOKENS)
    z = empty(groups * features, SAVED_TOKENS, saved).view(groups, features, SAVED_TOKENS)
    mlp = _c_mlp(m, biases, activation, rows, saved)
    arguments = (rows.data_ptr(), y.data_ptr(), z.data_ptr(), batch, torch.get_num_threads())
    call("rarefy_mlp_forward", ctypes.byref(mlp), *arguments)
    return y, z


def mlp_backward(
    m: Matrices, dy: Tensor, x: Tensor, z: Tensor, activation: int, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, then of each matrix' values and bias; x's or a bias' None where `needs` does not ask for it."""
    (dy_rows, x_rows), _ = _rows(dy, x)
    z = z.contiguous()
    m = tuple((_f32(values), index) for values, index in m)
    dx = empty(x.shape[0], x.shape[1], x_rows.dtype) if needs[0] else None
    gradients: list[Tensor | None] = []
    for (_, index), need_bias in zip(m, needs[2::2], strict=True):
        dvalues = _empty_values(index)
        gradients += [dvalues, dvalues.new_empty(index.out_features) if need_bias else None]
    mlp = _c_mlp(m, [None] * len(m), activation, x_rows, z.dtype)
    pairs = [(POINTER * 2)(_pointer(v), _pointer(b)) for v, b in zip(gradients[::2], gradients[1::2], strict=True)]
    into = _CMlpGradients(*([(POINTER * 2)()] if len(m) == 2 else []), *pairs)
    arguments = (dy_rows.data_ptr(), x_rows.data_ptr(), z.data_ptr(), _pointer(dx), ctypes.byref(into))
    call("rarefy_mlp_backward", ctypes.byref(mlp), *arguments, x.shape[0], torch.get_num_threads())
    return None if dx is None else dx.to(x.dtype), *gradients


TILE_ROWS, TILE_ENTRIES = 128, 1 << 22
"""A dense gradient tile in `grow_candidates` is a quarter of the matrix, as each tile's matmul packs x anew
(docs/log.md), but
at least this many output rows and, beyond those, at most this many entries: 16 MiB."""


def grow_candidates(index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.schema`. One tile of dense gradient exists at a time; its scan keeps the best k."""
    unit_rows, unit_cols = index.crow.shape[0] - 1, index.t_crow.shape[0] - 1
    k = min(k, unit_rows * unit_cols - index.num_units)
    units, scores = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=torch.float32)
    dy32, x32 = _f32(dy).detach(), _f32(x).detach()
    wanted = min(-(-index.out_features // 4), TILE_ENTRIES // max(1, index.in_features))
    step = max(1, max(TILE_ROWS, wanted) // index.block[0])
    buffer = empty(step * index.block[0], index.in_features)
    pattern, nonfinite, library = c_pattern(index), INT64(0), load()
    assert isinstance(library, ctypes.CDLL)
    selection = library.rarefy_grow_new(k)
    try:
        for first in range(0, unit_rows, step):
            rows = min(step, unit_rows - first)
            tile = buffer[: rows * index.block[0]]
            torch.mm(dy32[:, first * index.block[0] : (first + rows) * index.block[0]].T, x32, out=tile)
            threads = torch.get_num_threads()
            call("rarefy_grow_scan_f32", selection, ctypes.byref(pattern), tile.data_ptr(), first, rows, threads)
        found = library.rarefy_grow_finish(selection, units.data_ptr(), scores.data_ptr(), ctypes.byref(nonfinite))
    finally:
        library.rarefy_grow_free(selection)
    if nonfinite.value:  # the engine skips a rewire whose scores are not all finite (rewiring rule 8.3)
        scores.fill_(torch.inf)
        if not found and k:  # none was: one must show
            units[0], found = 0, 1
    return units[:found], scores[:found]
