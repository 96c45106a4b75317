"""Fresh memory without a page fault every 4 KiB.

An output of tens of megabytes is mapped anew at every call, and the faults cost as much as writing it three times over
(docs/log.md). Asking for huge pages, which Linux grants to those who ask, takes most of that away.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's madvise, None where there is none."""
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`torch.empty` on the CPU, in huge pages where it holds any. Advice only: a refusal changes nothing but time."""
    tensor = torch.empty(shape, dtype=dtype)
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin
    madvise = _madvise() if size >= HUGE_PAGE else None
    if madvise is not None:
        madvise(begin, size // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
    return tensor
