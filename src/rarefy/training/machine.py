"""What a run ran on, for logs and reports."""

from __future__ import annotations

import platform
import resource
import sys
from typing import Any

import torch

import rarefy
from rarefy.cost.host import cpu_name
from rarefy.ops import library


def machine() -> dict[str, Any]:
    """cpu (model name), isa (of the kernels, or "plain torch"), threads, torch, rarefy, python; gpu (name), where torch
    sees one.
    """
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu_name(),
        "isa": library.isa() or "plain torch",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rarefy": rarefy.__version__,
        "python": platform.python_version(),
        **gpu,
    }


def check_device(name: str) -> None:
    """Whether torch can compute there.

    Raises:
        ValueError: it cannot.
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}; cpu always can") from error


def peak_memory_bytes() -> int:
    """The most that this process has held in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
