"""The update of `rarefy.AdamW` on the CPU in one pass over a parameter, its gradient and its state (csrc/adamw.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy.ops.library import FLOAT, INT64, POINTER, call, load


class _CAdamW(ctypes.Structure):
    """`rarefy_adamw` of csrc/rarefy.h."""

    _fields_ = [
        *((name, INT64) for name in ("count", "entries")),
        *((name, POINTER) for name in ("values", "average", "square", "gradient", "age", "size_by_age", "root_by_age")),
        *((name, FLOAT) for name in ("decay", "new_average", "old_square", "new_square", "eps")),
    ]


def update(
    p: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    age: Tensor | None,
    by_age: tuple[Tensor, Tensor],
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step, in place, of a contiguous fp32 parameter and the two moments.

    Args:
        age: int32, one a leading index: steps that it has had, this one included. None: all have had the same.
        by_age: fp32 factors of the update and of the root of the second moment, by age; of all, if there is no age.
        decay: factor of the weights.
    """
    if not p.numel():
        return
    gradient = gradient.to(torch.float32).contiguous()
    step = _CAdamW(
        p.numel(),
        1 if age is None else p.numel() // age.numel(),
        *(t.data_ptr() for t in (p, average, square, gradient)),
        None if age is None else age.data_ptr(),
        *(table.data_ptr() for table in by_age),
        decay,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
    )
    call("rarefy_adamw_step", ctypes.byref(step), torch.get_num_threads())


def loaded() -> bool:
    """Whether there are compiled kernels."""
    return not isinstance(load(), str)


def runs(*tensors: Tensor) -> bool:
    """Whether the kernel takes such a parameter and state."""
    return all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
