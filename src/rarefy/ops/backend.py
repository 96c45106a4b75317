"""Which implementation runs an op: the fastest that can, unless the user named one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from rarefy.ops import library, native, reference, tiled

_named = os.environ.get("RAREFY_BACKEND", "auto")
_told: set[str] = set()


def available() -> list[str]:
    """Names that `using` takes on this machine, the specification first, the fastest last."""
    return ["reference", "tiled", *reversed(library.isas())]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the ops on one named backend: "reference", "tiled", or an instruction set such as "avx2".

    Raises:
        ValueError: the machine or the build does not offer it. Inside, an op that the backend cannot run raises too.
    """
    global _named
    if name != "auto" and name not in available():
        raise ValueError(f"backend {name!r} is not available here; there are: {', '.join(available())}")
    before, isa = _named, library.isa()
    _named = name
    if name in library.isas():
        library.set_isa(name)
    try:
        yield
    finally:
        _named = before
        if isa is not None:
            library.set_isa(isa)


def names_plain_torch() -> bool:
    """Whether the user named one of the implementations in plain torch, so that nothing else may run."""
    return _named in ("reference", "tiled")


def runs_kernels(why_not: str | None) -> bool:
    """Whether the compiled kernels run an op: not if the user named another backend, nor if they cannot (`why_not`).

    Raises:
        ValueError: they cannot, and the user named them.
    """
    if why_not is not None and _named not in ("auto", "reference", "tiled"):
        raise ValueError(f"backend {_named!r} was asked for, but {why_not}")
    return why_not is None and _named not in ("reference", "tiled")


def choose(dtype: torch.dtype, device: torch.device, block: list[int]) -> ModuleType:
    """The module whose functions run an op for values of this dtype, device and block.

    Raises:
        ValueError: the backend that the user named cannot.
    """
    if _named == "reference":
        return reference
    if _named == "tiled":
        return tiled
    why_not = native.why_not(dtype, device, block)
    if why_not is None or runs_kernels(why_not):
        return native
    if why_not not in _told:
        _told.add(why_not)
        if device.type == "cpu" and dtype != torch.float64:  # float64 is for checking gradients; no one expects speed
            warnings.warn(f"rarefy runs in plain torch, slower than its kernels: {why_not}", stacklevel=2)
    return tiled
