"""The C++ kernels behind the four operations: fp32 on CPU, through a plain C interface (csrc/rarefy.h).

The library links neither torch nor Python. It is loaded after torch, so that it finds torch's OpenMP runtime, and is told
the thread count at every call, so that `torch.set_num_threads` holds.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.pattern import unit_grid

LIBRARY = "librarefy_kernels.so"

_POINTER = ctypes.c_void_p
_INT64 = ctypes.c_int64


class _CPattern(ctypes.Structure):
    """`rarefy_pattern` of csrc/rarefy.h."""

    _fields_ = [
        *((name, _INT64) for name in ("out_features", "in_features", "block_rows", "block_cols", "num_units")),
        *((name, _POINTER) for name in ("crow", "cols", "t_crow", "t_rows", "t_perm")),
        ("index_bytes", ctypes.c_int32),
    ]


_SIGNATURES = {
    "rarefy_isa": (ctypes.c_char_p, []),
    "rarefy_isas": (ctypes.c_char_p, []),
    "rarefy_set_isa": (ctypes.c_int, [ctypes.c_char_p]),
    "rarefy_supports": (ctypes.c_int, [_INT64, _INT64]),
    "rarefy_spmm_f32": (ctypes.c_int, [_POINTER, *[_POINTER] * 4, _INT64, ctypes.c_int]),
    "rarefy_spmm_t_f32": (ctypes.c_int, [_POINTER, *[_POINTER] * 3, _INT64, ctypes.c_int]),
    "rarefy_sddmm_f32": (ctypes.c_int, [_POINTER, *[_POINTER] * 4, _INT64, ctypes.c_int]),
    "rarefy_backward_f32": (ctypes.c_int, [_POINTER, *[_POINTER] * 6, _INT64, ctypes.c_int]),
    "rarefy_grow_new": (_POINTER, [_INT64]),
    "rarefy_grow_scan_f32": (ctypes.c_int, [_POINTER, _POINTER, _POINTER, _INT64, _INT64, ctypes.c_int]),
    "rarefy_grow_finish": (_INT64, [_POINTER, _POINTER, _POINTER, _POINTER]),
    "rarefy_grow_free": (None, [_POINTER]),
}


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    beside = Path(__file__).parent.parent / LIBRARY
    path = beside if beside.is_file() else Path(str(resources.files("rarefy") / LIBRARY))
    if not path.is_file():
        return "this installation has no compiled kernels (there was no C++ compiler, or the wheel is the pure one)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled kernels could not be loaded: {error}"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    wanted = os.environ.get("RAREFY_ISA")
    if wanted and library.rarefy_set_isa(wanted.encode()):
        raise ValueError(
            f"RAREFY_ISA={wanted} is not available on this machine; there are: {library.rarefy_isas().decode()}"
        )
    return library


def _call(name: str, *arguments: object) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise RuntimeError(f"kernel {name} failed with code {code}")


def isas() -> list[str]:
    """Instruction sets that build and CPU offer, best first; empty without the library."""
    library = _library()
    return [] if isinstance(library, str) else library.rarefy_isas().decode().split(",")


def isa() -> str | None:
    """The instruction set in use, None without the library."""
    library = _library()
    return None if isinstance(library, str) else library.rarefy_isa().decode()


def set_isa(name: str) -> None:
    """Use this instruction set from now on.

    Raises:
        ValueError: it is not one of `isas()`.
    """
    library = _library()
    if isinstance(library, str) or library.rarefy_set_isa(name.encode()):
        raise ValueError(f"instruction set {name!r} is not available here; there are: {', '.join(isas()) or 'none'}")


def why_not(dtype: torch.dtype, device: torch.device, block: list[int]) -> str | None:
    """Why the kernels cannot run such values; None when they can."""
    library = _library()
    if isinstance(library, str):
        return library
    if device.type != "cpu":
        return f"the compiled kernels run on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compiled kernels compute in float32, not {dtype}"
    if not library.rarefy_supports(block[0], block[1]):
        return f"there is no compiled kernel for blocks of {block[0]}x{block[1]}"
    return None


def _c_pattern(index: Index) -> _CPattern:
    """Pointers into `index`, which must outlive the call."""
    arrays = (index.crow, index.cols, index.t_crow, index.t_rows, index.t_perm)
    assert all(array.is_contiguous() for array in arrays)
    return _CPattern(
        index.out_features,
        index.in_features,
        *index.block,
        index.num_units,
        *(array.data_ptr() for array in arrays),
        index.cols.element_size(),
    )


def _f32(tensor: Tensor) -> Tensor:
    """Contiguous fp32: what the kernels read. No copy for what already is."""
    return tensor.detach().to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    values, x32, bias = _f32(values), _f32(x), None if bias is None else _f32(bias)
    y = x32.new_empty(x.shape[0], index.out_features)
    arguments = (values.data_ptr(), x32.data_ptr(), _pointer(bias), y.data_ptr(), x.shape[0], torch.get_num_threads())
    _call("rarefy_spmm_f32", ctypes.byref(_c_pattern(index)), *arguments)
    return y.to(x.dtype)


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    values, dy32 = _f32(values), _f32(dy)
    dx = dy32.new_empty(dy.shape[0], index.in_features)
    arguments = (values.data_ptr(), dy32.data_ptr(), dx.data_ptr(), dy.shape[0], torch.get_num_threads())
    _call("rarefy_spmm_t_f32", ctypes.byref(_c_pattern(index)), *arguments)
    return dx.to(dy.dtype)


def _empty_values(index: Index) -> Tensor:
    shape = (index.num_units,) if index.block == [1, 1] else (index.num_units, *index.block)
    return torch.empty(shape, dtype=torch.float32)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    dy32, x32, dvalues = _f32(dy), _f32(x), _empty_values(index)
    arguments = (dy32.data_ptr(), x32.data_ptr(), dvalues.data_ptr(), None, x.shape[0], torch.get_num_threads())
    _call("rarefy_sddmm_f32", ctypes.byref(_c_pattern(index)), *arguments)
    return dvalues.to(x.dtype)


def spmm_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dvalues and dbias, each where `needs` asks for it; dy is packed once."""
    v32, dy32, x32 = _f32(values), _f32(dy), _f32(x)
    dx = torch.empty_like(x32) if needs[0] else None
    dvalues = _empty_values(index) if needs[1] else None
    dbias = dy32.new_empty(index.out_features) if needs[2] else None
    inputs = (v32.data_ptr(), dy32.data_ptr(), x32.data_ptr())
    outputs = (_pointer(dx), _pointer(dvalues), _pointer(dbias))
    _call("rarefy_backward_f32", ctypes.byref(_c_pattern(index)), *inputs, *outputs, x.shape[0], torch.get_num_threads())
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dvalues is None else dvalues.to(values.dtype),
        None if dbias is None else dbias.to(values.dtype),
    )


TILE_ROWS = 128
"""Output rows of a dense gradient tile in `grow_candidates`: enough for the matmul to run at full speed."""


def grow_candidates(index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.schema`. One tile of dense gradient exists at a time; its scan keeps the best k."""
    unit_rows, _ = unit_grid((index.out_features, index.in_features), (index.block[0], index.block[1]))
    k = min(k, unit_rows * (index.t_crow.shape[0] - 1) - index.num_units)
    units, scores = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=torch.float32)
    dy32, x32 = _f32(dy), _f32(x)
    step = max(1, TILE_ROWS // index.block[0])
    buffer = torch.empty(step * index.block[0], index.in_features, dtype=torch.float32)
    pattern, nonfinite, library = _c_pattern(index), _INT64(0), _library()
    assert isinstance(library, ctypes.CDLL)
    selection = library.rarefy_grow_new(k)
    try:
        for first in range(0, unit_rows, step):
            rows = min(step, unit_rows - first)
            tile = buffer[: rows * index.block[0]]
            torch.mm(dy32[:, first * index.block[0] : (first + rows) * index.block[0]].T, x32, out=tile)
            threads = torch.get_num_threads()
            _call("rarefy_grow_scan_f32", selection, ctypes.byref(pattern), tile.data_ptr(), first, rows, threads)
        found = library.rarefy_grow_finish(selection, units.data_ptr(), scores.data_ptr(), ctypes.byref(nonfinite))
    finally:
        library.rarefy_grow_free(selection)
    if nonfinite.value:  # the engine skips a rewire whose scores are not all finite (rewiring rule 8.3)
        scores.fill_(torch.inf)
    return units[:found], scores[:found]
