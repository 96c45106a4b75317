"""How large the tiles of a kernel are: the fastest of a few, timed once a machine and kept on disk.

Triton's own autotuner times and keeps them, in its cache folder (`TRITON_CACHE_DIR`, else ~/.triton/cache), by kernel
source, GPU, Triton version, dtypes and the key. Keys are sizes rounded to powers of two, so that batches of other
sizes and rewires tune nothing anew. `RAREFY_TUNE=0` takes the first tiles, which fit everywhere, and times nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import triton

from rarefy.ops.triton import interpreted

Meta = Mapping[str, Any]

_forced: dict[str, Meta] = {}

_times = os.environ.get("RAREFY_TUNE", "1") != "0"


class Tuned:
    """A kernel and the tiles it may have.

    Args:
        kernel: what `triton.jit` made.
        configs: to choose from; the first fits on every GPU. One alone is never timed, so that it may be of a kernel
            that cannot run twice.
        key: names of the kernel's arguments that the choice depends on, besides dtypes.
        interpreted: tiles for the interpreter, which has no clock worth asking.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], key: Sequence[str], interpreted: Meta) -> None:
        self.name = kernel.fn.__name__
        self.kernel = kernel
        self.configs = list(configs)
        self._interpreted = interpreted
        self._tuner = triton.autotune(configs=list(configs), key=list(key), cache_results=True)(kernel)

    def launch(self, grid: Callable[[Meta], tuple[int, ...]], *arguments: Any, **constants: Any) -> None:
        """Run it over a grid that depends on the tiles."""
        meta = _forced.get(self.name, self._interpreted if interpreted() else None)
        if meta is None and not _times:
            meta = self.configs[0].all_kwargs()
        if meta is None:
            self._tuner[grid](*arguments, **constants)
        else:
            self.kernel[grid](*arguments, **constants, **meta)


def tuned(configs: Sequence[triton.Config], *, key: Sequence[str] = (), interpreted: Meta) -> Callable[[Any], Tuned]:
    """Decorates a kernel; see `Tuned`."""
    return lambda kernel: Tuned(kernel, configs, key, interpreted)


@contextmanager
def forced(kernel: Tuned, meta: Meta) -> Iterator[None]:
    """Tiles for a kernel that a test or an experiment names."""
    _forced[kernel.name] = meta
    try:
        yield
    finally:
        del _forced[kernel.name]


def bucket(size: int) -> int:
    """The power of two at or above, at least 16: sizes that share their tiles."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16
