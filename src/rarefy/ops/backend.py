"""Which implementation runs an op: the fastest that can, unless the user named one."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from rarefy.ops import library, native, reference, tiled, triton, two_four
from rarefy.ops.index import Index

_named = os.environ.get("RAREFY_BACKEND", "auto")
_told: set[str] = set()


def available(device: str = "cpu") -> list[str]:
    """Names that `using` takes for tensors on a device of this machine, the specification first, the fastest last.

    "triton" is a name too where its kernels are interpreted on the CPU, which is for tests and not listed.
    """
    if device == "cpu":
        return ["reference", "tiled", *reversed(library.isas())]
    return ["reference", "tiled", *(["triton"] if device == "cuda" and triton.usable() else [])]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the ops on one named backend: "reference", "tiled", or an instruction set such as "avx2".

    Raises:
        ValueError: the machine or the build does not offer it. Inside, an op that the backend cannot run raises too.
    """
    global _named
    if name not in ("auto", *available()) and not (name == "triton" and triton.usable()):
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
    if why_not is not None and _named not in ("auto", "reference", "tiled", "triton"):
        raise ValueError(f"backend {_named!r} was asked for, but {why_not}")
    return why_not is None and _named not in ("reference", "tiled", "triton")


def runs_triton(device: torch.device) -> bool:
    """Whether kernels in Triton that know any block, such as an optimizer's, run on a device."""
    if _named == "triton":
        return triton.usable()
    return _named == "auto" and device.type == "cuda" and triton.usable() and not triton.interpreted()


def choose(dtype: torch.dtype, device: torch.device, block: list[int], index: Index | None = None) -> ModuleType:
    """The module whose functions run an op for values of this dtype, device and block.

    Args:
        index: of the values, where some patterns of a block have kernels of their own.
    Raises:
        ValueError: the backend that the user named cannot.
    """
    if _named == "reference":
        return reference
    if _named == "tiled":
        return tiled
    if _named == "triton" or (_named == "auto" and device.type == "cuda"):
        why_not = triton.why_not(dtype, device, block)
        if why_not is None:
            return importlib.import_module("rarefy.ops.triton.operations")
        if index is not None and two_four.why_not(device) is None and two_four.by_row(index):
            return importlib.import_module("rarefy.ops.triton.two_four")
        if _named == "triton":
            raise ValueError(f"backend 'triton' was asked for, but {why_not}")
        return _fallback(why_not, device, dtype)
    why_not = native.why_not(dtype, device, block)
    if why_not is None or runs_kernels(why_not):
        return native
    return _fallback(why_not, device, dtype)


def _fallback(why_not: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Plain torch; says once why, where someone expects speed: float64 is for checking gradients."""
    if why_not not in _told:
        _told.add(why_not)
        if device.type in ("cpu", "cuda") and dtype != torch.float64:
            slower = "at a dense layer's cost or more" if device.type == "cuda" else "slower than its kernels"
            warnings.warn(f"rarefy runs in plain torch, {slower}: {why_not}", stacklevel=3)
    return tiled
