"""The compiled kernels as a loaded library (csrc/rarefy.h): found, opened once, its instruction set chosen.

It links neither torch nor Python. It is opened after torch, so that it finds torch's OpenMP runtime, and is told the
thread count at every call, so that `torch.set_num_threads` holds.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib import resources
from pathlib import Path

import torch  # noqa: F401  (first: it brings the OpenMP runtime that the library uses)

LIBRARY = "librarefy_kernels.so"

INTERFACE = "9069f5dc820679a8"
"""First digits of the SHA-256 of the csrc/rarefy.h that this package calls. A library that was built from another one
would misread its arguments."""

POINTER = ctypes.c_void_p
INT64 = ctypes.c_int64
FLOAT = ctypes.c_float

_SIGNATURES = {
    "rarefy_isa": (ctypes.c_char_p, []),
    "rarefy_isas": (ctypes.c_char_p, []),
    "rarefy_set_isa": (ctypes.c_int, [ctypes.c_char_p]),
    "rarefy_supports": (ctypes.c_int, [INT64, INT64]),
    "rarefy_spmm_f32": (ctypes.c_int, [POINTER, *[POINTER] * 4, INT64, ctypes.c_int]),
    "rarefy_backward_f32": (ctypes.c_int, [POINTER, *[POINTER] * 6, INT64, ctypes.c_int]),
    "rarefy_spmm_bf16": (ctypes.c_int, [POINTER, *[POINTER] * 4, INT64, ctypes.c_int]),
    "rarefy_backward_bf16": (ctypes.c_int, [POINTER, *[POINTER] * 6, INT64, ctypes.c_int]),
    "rarefy_spmm_medium": (ctypes.c_int, [POINTER, *[POINTER] * 4, INT64, ctypes.c_int]),
    "rarefy_backward_medium": (ctypes.c_int, [POINTER, *[POINTER] * 6, INT64, ctypes.c_int]),
    "rarefy_mlp_forward": (ctypes.c_int, [POINTER, *[POINTER] * 3, INT64, ctypes.c_int]),
    "rarefy_mlp_backward": (ctypes.c_int, [POINTER, *[POINTER] * 5, INT64, ctypes.c_int]),
    "rarefy_attention": (ctypes.c_int, [*[POINTER] * 4, ctypes.c_int32, *[INT64] * 4, ctypes.c_int]),
    "rarefy_attention_backward": (
        ctypes.c_int,
        [*[POINTER] * 6, ctypes.c_int32, *[INT64] * 4, ctypes.c_int],
    ),
    "rarefy_convolve": (ctypes.c_int, [*[POINTER] * 6, ctypes.c_int32, ctypes.c_int]),
    "rarefy_convolve_backward": (ctypes.c_int, [*[POINTER] * 8, ctypes.c_int32, ctypes.c_int]),
    "rarefy_norm_forward": (ctypes.c_int, [*[POINTER] * 4, ctypes.c_int]),
    "rarefy_norm_backward": (ctypes.c_int, [*[POINTER] * 8, ctypes.c_int]),
    "rarefy_layer_norm_forward": (ctypes.c_int, [*[POINTER] * 7, ctypes.c_int]),
    "rarefy_layer_norm_backward": (ctypes.c_int, [*[POINTER] * 10, ctypes.c_int]),
    "rarefy_adamw_step": (ctypes.c_int, [POINTER, INT64, ctypes.c_int]),
    "rarefy_link_pairs": (ctypes.c_int, [POINTER, ctypes.c_int32, POINTER, ctypes.c_int]),
    "rarefy_link_scores": (ctypes.c_int, [POINTER, ctypes.c_int32, POINTER, INT64, INT64, POINTER, ctypes.c_int]),
    "rarefy_transpose": (ctypes.c_int, [INT64, INT64, *[POINTER] * 5, ctypes.c_int32]),
    "rarefy_expand_f32": (ctypes.c_int, [*[POINTER] * 3, ctypes.c_int]),
    "rarefy_collect_f32": (ctypes.c_int, [*[POINTER] * 3, ctypes.c_int]),
    "rarefy_grow_new": (POINTER, [INT64]),
    "rarefy_grow_scan_f32": (ctypes.c_int, [POINTER, POINTER, POINTER, INT64, INT64, ctypes.c_int]),
    "rarefy_grow_finish": (INT64, [POINTER, POINTER, POINTER, POINTER]),
    "rarefy_grow_free": (None, [POINTER]),
    "rarefy_tensor_new": (POINTER, [INT64, INT64, ctypes.c_int32]),
    "rarefy_probe": (INT64, [ctypes.c_int32, POINTER, INT64, INT64, ctypes.c_int]),
    "rarefy_workspace_bytes": (INT64, []),
    "rarefy_workspace_release": (None, []),
}


@functools.cache
def load() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    beside = Path(__file__).parent.parent / LIBRARY
    path = beside if beside.is_file() else Path(str(resources.files("rarefy") / LIBRARY))
    if not path.is_file():
        return "this installation has no compiled kernels (there was no C++ compiler, or the wheel is the pure one)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled kernels could not be loaded: {error}"
    if not _knows_interface(library):
        return (
            f"the compiled kernels in {path} were built from another version of the source than this package: install "
            "it again (from a checkout: make)"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    wanted = os.environ.get("RAREFY_ISA")
    if wanted and library.rarefy_set_isa(wanted.encode()):
        raise ValueError(
            f"RAREFY_ISA={wanted} is not available on this machine; there are: {library.rarefy_isas().decode()}"
        )
    return library


def _knows_interface(library: ctypes.CDLL) -> bool:
    try:
        interface = library.rarefy_interface
    except AttributeError:
        return False
    interface.restype, interface.argtypes = ctypes.c_char_p, []
    return interface().decode().startswith(INTERFACE)


def call(name: str, *arguments: object) -> None:
    """Run a kernel that returns an error code.

    Raises:
        RuntimeError: it returned one other than 0.
    """
    code = getattr(load(), name)(*arguments)
    if code:
        raise RuntimeError(f"kernel {name} failed with code {code}")


def isas() -> list[str]:
    """Instruction sets that build and CPU offer, best first; empty without the library."""
    library = load()
    return [] if isinstance(library, str) else library.rarefy_isas().decode().split(",")


def isa() -> str | None:
    """The instruction set in use, None without the library."""
    library = load()
    return None if isinstance(library, str) else library.rarefy_isa().decode()


def set_isa(name: str) -> None:
    """Use this instruction set from now on.

    Raises:
        ValueError: it is not one of `isas()`.
    """
    library = load()
    if isinstance(library, str) or library.rarefy_set_isa(name.encode()):
        raise ValueError(f"instruction set {name!r} is not available here; there are: {', '.join(isas()) or 'none'}")
