"""What this machine can do at most, measured: arithmetic of each kind and bandwidth from each level of memory.

The work itself is csrc/probe.h. A ceiling is what a kernel that never waits would reach; a share of it tells how much a
kernel leaves, whatever the machine.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rarefy.ops import backend, library

FMA_F32, DOT_BF16, TILES_BF16, READ, COPY = range(5)
"""As in csrc/rarefy.h."""

LAP_S = 0.004
"""The work of a reading takes a thread at least this long: starting the threads must not count."""

MEMORY_BYTES = 512 << 20
"""The working set that stands for main memory. A processor whose last cache is larger answers from there."""

FALLBACK_L2_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Medians of what was reached with all of torch's threads. Arithmetic in GFLOP/s, bandwidth in GB/s (1e9)."""

    fp32: Mapping[str, float] = field(default_factory=dict)
    """Multiply-adds out of registers, by instruction set."""

    bf16_dot: float | None = None
    """bf16 dot products into fp32 (AVX512_BF16); None: the CPU has none."""

    bf16_tiles: float | None = None
    """bf16 matrix products into fp32 (AMX); None: the CPU has none."""

    l2_read: float | None = None
    """Bytes read from a working set of a quarter of the second cache of every core."""

    l2_copy: float | None = None
    """The same, copied from one half to the other: bytes read plus bytes written."""

    memory_read: float | None = None
    memory_copy: float | None = None
    """As a program sees it: that a store reads its line first is not counted."""

    def peak(self, dtype: str, isa: str, *, tiles: bool = False) -> float | None:
        """The most GFLOP/s that products in a dtype can reach; None where it was not measured.

        Args:
            dtype: "fp32", or "medium" or "bf16", where bf16 products count as well if AVX-512 is in use.
            isa: the instruction set of the fp32 arithmetic. bf16 products do not replace it where they are slower, as
                on some processors.
            tiles: whether what computes may use AMX.
        """
        isa = vectors(isa)
        kinds = [self.fp32.get(isa)]
        if dtype != "fp32" and isa.startswith("avx512"):
            kinds += [self.bf16_dot, self.bf16_tiles if tiles else None]
        return max((kind for kind in kinds if kind is not None), default=None)

    def readings(self) -> dict[str, float]:
        """Name -> figure, of what was measured."""
        named = {f"fp32 {isa}": rate for isa, rate in self.fp32.items()}
        named |= {name.replace("_", " "): getattr(self, name) for name in FIELDS}
        return {name: rate for name, rate in named.items() if rate is not None}


FIELDS = ("bf16_dot", "bf16_tiles", "l2_read", "l2_copy", "memory_read", "memory_copy")


def vectors(isa: str) -> str:
    """The instruction set of an instruction set's fp32 arithmetic: amx and avx512bf16 add bf16 products to avx512."""
    return "avx512" if isa in ("amx", "avx512bf16") else isa


def measure(isas: list[str] | None = None, *, seconds: float = 1.0) -> Ceilings:
    """Run the probe with torch's threads. Without the compiled library nothing is measured.

    Args:
        isas: whose fp32 arithmetic to measure; None: the one in use. The wider part is measured with the best of them.
        seconds: about how long, shared by all figures.
    Cost: MEMORY_BYTES of memory for a moment, and half a second on the first call, while it is handed out.
    """
    if isinstance(library.load(), str):
        return Ceilings()
    isas = list(dict.fromkeys(map(vectors, isas or [library.isa() or ""])))
    each_s = seconds / (len(isas) + len(FIELDS))
    fp32 = {}
    for isa in isas:
        with backend.using(isa):
            fp32[isa] = rate(FMA_F32, seconds=each_s) or 0.0
    with backend.using(max(isas, key=lambda isa: fp32[isa])):
        dot, tiles = rate(DOT_BF16, seconds=each_s), rate(TILES_BF16, seconds=each_s)
        memory = torch.ones(MEMORY_BYTES // 4)
        near = memory[: l2_bytes() * torch.get_num_threads() // 16]  # pages lie anyhow: half of it would overflow sets
        bandwidths = [rate(work, part, seconds=each_s) for part in (near, memory) for work in (READ, COPY)]
    return Ceilings(fp32=fp32, bf16_dot=dot, bf16_tiles=tiles, **dict(zip(FIELDS[2:], bandwidths, strict=True)))


def rate(
    work: int,
    data: torch.Tensor | None = None,
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    call: Callable[..., int] | None = None,
) -> float | None:
    """Median of GFLOP/s, or of GB/s where there is data, over readings of at least LAP_S; None: not on this CPU.

    Args:
        work: one of the kinds above.
        data: the working set of reads and copies, contiguous fp32; its contents are overwritten.
        seconds: for how long to read, three readings at least. Finding the work that fills one comes first.
        clock, call: stand-ins for tests.
    """
    if call is None:
        loaded = library.load()
        if isinstance(loaded, str):
            return None
        call = loaded.rarefy_probe
    assert call is not None
    pointer, size = (None, 0) if data is None else (data.data_ptr(), data.numel() * data.element_size())
    threads, repeats = torch.get_num_threads(), 1

    def reading(threads: int, size: int) -> tuple[int, float]:
        begun = clock()
        done = call(work, pointer, size, repeats, threads)
        return done, clock() - begun

    # One thread alone, which waits for no other: where cores are taken, threads that meet can wait for milliseconds
    # over next to no work.
    while True:
        tries = [reading(1, size // threads) for _ in range(3)]
        if tries[0][0] <= 0:
            return None
        if min(took for _, took in tries) >= LAP_S:
            break
        repeats *= 2
    figures: list[float] = []
    begun = clock()
    while len(figures) < 3 or clock() - begun < seconds:
        done, took = reading(threads, size)
        figures.append(done / took / 1e9)
    return statistics.median(figures)


def l2_bytes() -> int:
    """Bytes of a core's second-level cache, or a guess."""
    for index in ("index2", "index1"):
        folder = Path("/sys/devices/system/cpu/cpu0/cache") / index
        try:
            if (folder / "level").read_text().strip() == "2":
                text = (folder / "size").read_text().strip()
                return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
        except (OSError, ValueError):
            continue
    return FALLBACK_L2_BYTES


# -- what torch may use -----------------------------------------------------------------------------------------------

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""In /proc/cpuinfo: x86 with dot products or tiles, and Arm."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that the processor can do; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(flags[0] if flags else [])


def held_onednn() -> str:
    """The instruction set that the user's environment holds oneDNN to, in capitals; "" if to none."""
    name = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return "" if name.upper() in ("ALL", "DEFAULT") else name.upper()


def dense_has_bf16() -> bool:
    """Whether torch's dense bf16 products run on hardware made for them: without it they take many times as long."""
    held = held_onednn()
    return bool(BF16_FLAGS & cpu_flags()) and (
        not held or any(part in held for part in ("BF16", "FP16", "AMX", "AVX10"))
    )


def dense_has_tiles() -> bool:
    """Whether they may use AMX."""
    held = held_onednn()
    return "amx_bf16" in cpu_flags() and (not held or "AMX" in held)


def dense_isa() -> str:
    """The best of `library.isas()` that dense fp32 products may use here; "" without the compiled library.

    MKL computes them on x86; MKL_ENABLE_INSTRUCTIONS=AVX2 holds it back.
    """
    held = os.environ.get("MKL_ENABLE_INSTRUCTIONS", "").upper()
    there = [isa for isa in library.isas() if isa == vectors(isa)]
    if held in ("AVX2", "AVX2_E1"):
        there = [isa for isa in there if not isa.startswith("avx512")]
    elif held in ("AVX", "SSE4_2"):
        there = [isa for isa in there if isa == "portable"]
    return there[0] if there else ""
