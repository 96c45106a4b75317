"""Outputs in memory that is reused: csrc/memory.cpp.

An output of tens of megabytes that torch's allocator maps anew at every call costs its page faults each time
(docs/log.md). The kernels' own pool keeps such blocks from step to step, as torch does on GPUs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy.ops.library import load

POOLED_BYTES = 1 << 20
"""Smaller tensors come from torch's allocator, which does not go to the system for them."""

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.argtypes, _new_capsule.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object


def empty(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`torch.empty((rows, cols))` on the CPU, float32 or bfloat16, from the pool where it is large."""
    library = load()
    if rows * cols * dtype.itemsize < POOLED_BYTES or isinstance(library, str):
        return torch.empty(rows, cols, dtype=dtype)
    managed = library.rarefy_tensor_new(rows, cols, dtype.itemsize)
    if not managed:
        raise MemoryError(f"there is no memory for an output of {rows * cols * dtype.itemsize:,} bytes")
    return torch.from_dlpack(_new_capsule(managed, b"dltensor", None))


def kept_bytes() -> int:
    """Bytes that the pool keeps for later outputs and scratch; 0 without the library."""
    library = load()
    return 0 if isinstance(library, str) else library.rarefy_workspace_bytes()


def release() -> None:
    """Give what the pool keeps back to the system. Tensors in use are not touched."""
    library = load()
    if not isinstance(library, str):
        library.rarefy_workspace_release()


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_set_option = getattr(ctypes.CDLL(None), "mallopt", None)

TRIM_THRESHOLD, MAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt(3)."""

MOST_MAPPED = 32 << 20
"""Bytes; the largest threshold that glibc takes. What is larger is mapped anew at every call, whatever it is told."""


def keep_freed() -> None:
    """Have the C library keep what is freed for what comes, up to 32 MiB each; nothing where it is not glibc.

    A step allocates what the one before freed. By itself glibc gives back the end of its heap and asks for it again,
    page by page, at every step of a small network (docs/log.md). It is a wish for the whole process, so programs make
    it, not the library.
    """
    if _set_option is not None:
        _set_option(TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
        _set_option(MAP_THRESHOLD, ctypes.c_int(MOST_MAPPED))


def trim() -> None:
    """Give back to the system what was freed and the C library keeps; nothing where it is not glibc. About a
    millisecond a gigabyte that the process holds.
    """
    if _trim is not None:
        _trim(0)
