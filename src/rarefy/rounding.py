"""Stochastic rounding to bfloat16, by a counter: the same bits on every device, for any number of threads.

A weight in bf16 that takes steps below half a unit in its last place never moves when it is rounded to the nearest, and
moves as far as it should on average when it is rounded up or down by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(bits: int) -> int:
    """A hash of 32 bits, one to one: Chris Wellons' lowbias32 (hash-prospector, public domain)."""
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)


def key_of(*parts: int) -> int:
    """31 bits that depend on all of the numbers and on their order."""
    key = 0
    for part in parts:
        key = mix((key ^ (part & _MASK)) & _MASK)
        key = mix(key ^ ((part >> 32) & _MASK))
    return key >> 1


def noise(count: int, key: int, device: torch.device) -> Tensor:
    """(count,) int32 in [0, 2^16): of each place, independent for each key."""
    bits = torch.arange(count, device=device)  # int64, in which products of 32 bits wrap, and their low half is right
    for salt in (0, key):
        bits = bits ^ salt
        bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _MASK
        bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _MASK
        bits = bits ^ (bits >> 16)
    return (bits & 0xFFFF).to(torch.int32)


def to_bfloat16(exact: Tensor, key: int) -> Tensor:
    """float32 to one of the two nearest bf16 numbers, up with the probability that makes the mean exact.

    What is not finite stays so.
    """
    raw = exact.contiguous().view(torch.int32)
    rounded = (raw + noise(raw.numel(), key, raw.device).view_as(raw)) & ~0xFFFF
    return torch.where(torch.isfinite(exact), rounded.view(torch.float32), exact).to(torch.bfloat16)
