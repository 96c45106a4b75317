"""The update of `rarefy.AdamW` on the CPU, one pass over parameters, gradients and state (csrc/adamw.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

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


class Update(NamedTuple):
    """One step of a contiguous fp32 parameter and its two moments."""

    p: Tensor
    gradient: Tensor
    average: Tensor
    square: Tensor

    age: Tensor | None
    """int32, one a leading index: steps that it has had, this one included. None: all have had the same."""

    by_age: tuple[Tensor, Tensor]
    """fp32 factors of the update and of the root of the second moment, by age; of all, if there is no age."""

    decay: float
    """Factor of the weights."""

    betas: tuple[float, float]
    eps: float


def update(updates: Sequence[Update]) -> None:
    """Of different parameters, in place, in one call."""
    updates = [one for one in updates if one.p.numel()]
    gradients = [one.gradient.to(torch.float32).contiguous() for one in updates]
    steps = (_CAdamW * len(updates))(*map(_step, updates, gradients))
    call("rarefy_adamw_step", steps, len(updates), torch.get_num_threads())


def _step(one: Update, gradient: Tensor) -> _CAdamW:
    p, age, (size_by_age, root_by_age) = one.p, one.age, one.by_age
    return _CAdamW(
        p.numel(),
        1 if age is None else p.numel() // age.numel(),
        p.data_ptr(),
        one.average.data_ptr(),
        one.square.data_ptr(),
        gradient.data_ptr(),
        None if age is None else age.data_ptr(),
        size_by_age.data_ptr(),
        root_by_age.data_ptr(),
        one.decay,
        1 - one.betas[0],
        one.betas[1],
        1 - one.betas[1],
        one.eps,
    )


def loaded() -> bool:
    """Whether there are compiled kernels."""
    return not isinstance(load(), str)


def runs(*tensors: Tensor) -> bool:
    """Whether the kernel takes such a parameter and state."""
    return all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
