"""In which arithmetic a contender runs, for the time of a lap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from rarefy import probe

DTYPES = ("fp32", "medium", "bf16")
"""fp32: throughout. medium: fp32 tensors, whose products may round to bf16 inside, as
torch.set_float32_matmul_precision("medium") allows. bf16: activations in bf16, under autocast."""

ACTIVATIONS = {"fp32": torch.float32, "medium": torch.float32, "bf16": torch.bfloat16}
"""What a layer gets from the one before it."""


def dense_dtypes() -> tuple[str, ...]:
    """In what dense torch is timed here: fp32, and the others where there is hardware for bf16."""
    return DTYPES if probe.dense_has_bf16() else DTYPES[:1]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Torch's matmul precision as the dtype says; set back afterwards. Around a backward pass, or an op by itself."""
    before, wanted = torch.get_float32_matmul_precision(), "medium" if dtype == "medium" else "highest"
    if before == wanted:  # setting it takes some microseconds, which a small product would notice
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """`precision`, and autocast for bf16. Around a forward pass."""
    with precision(dtype):
        if dtype != "bf16":
            yield
            return
        with torch.autocast("cpu", torch.bfloat16):
            yield
