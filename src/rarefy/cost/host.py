"""What a timing holds for: the processor, threads, torch, and the kernels as they were built."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from rarefy.cost.batching import Batching
from rarefy.cost.timing import kernels_for
from rarefy.ops import library

CALIBRATED_BLOCKS = ((1, 1), (4, 1), (8, 1), (4, 4), (8, 8), (16, 16))
"""Blocks that the kernels know, the least constrained first."""

_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")
"""Environment variables that change what dense torch runs."""


def conditions() -> dict[str, Any]:
    """Everything that timings depend on and that does not change within them. Plain data."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels_for(CALIBRATED_BLOCKS[0]),
        "build": _build(),
        "limits": {name: os.environ[name] for name in _LIMITS if name in os.environ},
    }


_FLOATS = {"avx2": 8, "avx512": 16, "avx512bf16": 16, "amx": 16}
"""In a vector, by instruction set; four elsewhere (csrc/simd.h)."""


def batching() -> Batching:
    """How the kernels in use here and now share out the images of a convolution."""
    kernels = kernels_for(CALIBRATED_BLOCKS[0])
    return Batching(torch.get_num_threads(), _FLOATS.get(kernels, 4), kernels == "avx512bf16")


def cpu_name() -> str:
    """The processor's model name, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _build() -> str:
    """A digest of the kernels' binary; empty without one."""
    loaded = library.load()
    return "" if isinstance(loaded, str) else hashlib.sha256(Path(loaded._name).read_bytes()).hexdigest()[:16]
