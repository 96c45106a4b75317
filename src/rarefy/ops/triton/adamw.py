"""The update of `rarefy.AdamW` in one pass over a parameter, its gradient and its state.

Arithmetic is fp32 whatever is stored; bf16 is rounded stochastically, by the same counter as `rarefy.rounding`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rarefy.ops.triton import device
from rarefy.ops.triton.rows import rounded
from rarefy.ops.triton.tuning import tuned


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * tl.full((1,), 0x7FEB352D, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full((1,), 0x846CA68B, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _store(to, value, place, key, mask):
    DTYPE: tl.constexpr = to.dtype.element_ty
    if tl.bfloat16 == DTYPE:
        noise = _mix(_mix(place.to(tl.uint32)) ^ key.to(tl.uint32)) & 0xFFFF
        raw = value.to(tl.uint32, bitcast=True)
        finite = (raw & 0x7F800000) != 0x7F800000
        value = tl.where(finite, ((raw + noise) & 0xFFFF0000).to(tl.float32, bitcast=True), value)
    tl.store(to + place, rounded(value, DTYPE), mask)


@tuned([triton.Config({"COUNT": 1024}, num_warps=4)], interpreted={"COUNT": 256})
@triton.jit(do_not_specialize=["p_key", "average_key", "square_key"])
def adamw_kernel(
    p,
    gradient,
    average,
    square,
    age,
    size_by_age,
    root_by_age,
    count,
    entries,
    decay,
    new_average,
    old_square,
    new_square,
    eps,
    p_key,
    average_key,
    square_key,
    COUNT: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    mask = place < count
    steps = tl.load(age + place // entries, mask, other=0)
    g = tl.load(gradient + place, mask, other=0.0).to(tl.float32)
    m = tl.load(average + place, mask, other=0.0).to(tl.float32)
    v = tl.load(square + place, mask, other=0.0).to(tl.float32)
    m += (g - m) * new_average
    v = v * old_square + g * g * new_square
    denominator = tl.sqrt(v) * tl.load(root_by_age + steps, mask, other=1.0) + eps
    value = tl.load(p + place, mask, other=0.0).to(tl.float32) * decay
    value -= m / denominator * tl.load(size_by_age + steps, mask, other=0.0)
    _store(average, m, place, average_key, mask)
    _store(square, v, place, square_key, mask)
    _store(p, value, place, p_key, mask)


def update(
    p: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    age: Tensor,
    by_age: tuple[Tensor, Tensor],
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    keys: tuple[int, int, int],
) -> None:
    """One step, in place, of a contiguous parameter and the two moments.

    Args:
        age: int32, one a leading index: steps that it has had, this one included.
        by_age: fp32 factors of the update and of the root of the second moment, by age.
        decay: factor of the weights.
        keys: of the rounding of p, average and square.
    """
    if not p.numel():
        return
    with device.guard(p):
        adamw_kernel.launch(
            lambda meta: (triton.cdiv(p.numel(), meta["COUNT"]),),
            p,
            gradient.to(p.dtype).contiguous(),
            average,
            square,
            age,
            *by_age,
            p.numel(),
            p.numel() // age.numel(),
            decay,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            *keys,
        )


def runs(*tensors: Tensor) -> bool:
    """Whether the kernel takes such a parameter and state."""
    return all(t.is_contiguous() and t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in tensors)
