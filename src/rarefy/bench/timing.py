"""The bench itself: what is timed in which order, with how much of the time, between two looks at the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rarefy import ops, probe
from rarefy.bench.gpt import bench_gpt
from rarefy.bench.gpu import bench_layer_on_gpu, kernels_on_gpu, timed_on
from rarefy.bench.gpu_peers import installed_for_gpu
from rarefy.bench.images import bench_cnn, bench_conv
from rarefy.bench.layers import bench_apart, bench_layer
from rarefy.bench.peers import installed
from rarefy.bench.results import DENSE, Check, Results, Row
from rarefy.bench.settings import Conv, Pair, Settings
from rarefy.cost import interleaved, kernels_for, random_batch
from rarefy.ops import library
from rarefy.settings import to_plain
from rarefy.training.machine import check_device, machine

PROBE_S, REFERENCE_S = 0.8, 0.5
"""For each of the two looks at the machine."""

GPU_SIDE = 4096
"""Of the matrices of a GPU's dense reference."""

ABOVE = 1.05
"""A share of the ceiling that no noise explains."""


def run(settings: Settings, *, progress: Callable[[str], None] = lambda text: None) -> Results:
    """Time sparse against dense, in this process.

    Args:
        progress: told what is being timed.
    Raises:
        ValueError: a backend or a block that the machine does not offer; before anything is timed.
    """
    if settings.device != "cpu":
        return _run_on_gpu(settings, progress)
    started = time.perf_counter()
    notes: list[str] = []
    rows: list[Row] = []
    with _threads(settings.threads), ops.using(settings.isa):
        kernels = {block: kernels_for(block) for block in settings.blocks}  # raises where a named backend lacks one
        about = {**machine(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        about |= {"dense_isa": probe.dense_isa(), "dense_bf16": probe.dense_has_bf16()}
        if library.isa() and about["dense_isa"] not in ("", library.isa()):
            notes.append(
                f"dense torch may use {about['dense_isa']}, the kernels {library.isa()}: see docs/measuring.md"
            )
        peers = installed(torch.get_num_threads(), notes) if settings.peers and settings.shapes else []
        beside, apart = ([peer for peer in peers if peer.own_threads is own] for own in (False, True))
        jobs = _jobs(settings, with_apart=bool(apart))
        progress("the machine")
        first_ms, first = _look(settings)
        for job in jobs:
            progress(job.name)
            if job.conv is not None:
                rows += bench_conv(job.conv, settings, kernels, notes, budget_s=job.budget_s)
            elif job.kind == "cnn":
                rows += bench_cnn(job.cnn, settings, kernels, notes, budget_s=job.budget_s)
            elif job.kind == "gpt":
                rows += bench_gpt(job.shape, settings, kernels, notes, budget_s=job.budget_s)
            elif job.kind == "layer":
                given = (job.shape, job.tokens, settings, kernels, beside, notes)
                rows += bench_layer(*given, budget_s=job.budget_s)
            else:
                rows += bench_apart(job.shape, job.tokens, settings, apart, notes, budget_s=job.budget_s)
        progress("the machine")
        last_ms, last = _look(settings)
    check = Check(first_ms, last_ms, first, last)
    rows = [dataclasses.replace(row, ceiling_gflops=_ceiling(row, check)) for row in rows]
    notes += [
        f"{row.contender} {row.dtype} reached {row.share:.0%} of its ceiling: the probe was disturbed"
        for row in rows
        if row.share and row.share > ABOVE
    ][:1]
    took = time.perf_counter() - started
    return Results(machine=about, settings=to_plain(settings), rows=rows, check=check, seconds=took, notes=notes)


def _run_on_gpu(settings: Settings, progress: Callable[[str], None]) -> Results:
    """The same on a GPU: no probe looks at it, so no row has a ceiling."""
    started = time.perf_counter()
    check_device(settings.device)
    device, rows = torch.device(settings.device), []
    notes = [] if not settings.shapes else [ON_GPU]
    about = {**machine(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    with _threads(settings.threads), ops.using(settings.isa):
        peers = installed_for_gpu(notes) if settings.peers and settings.shapes else []
        first_ms = _look_at_gpu(device)
        for job in _jobs(settings, with_apart=False):
            progress(job.name)
            if job.kind == "gpt":
                kernels = {block: kernels_on_gpu(block, device) for block in settings.blocks}
                rows += bench_gpt(job.shape, settings, kernels, notes, budget_s=job.budget_s, device=device)
            else:
                given = (job.shape, job.tokens, settings, peers, notes)
                rows += bench_layer_on_gpu(*given, device=device, budget_s=job.budget_s)
        check = Check(first_ms, _look_at_gpu(device))
    took = time.perf_counter() - started
    return Results(machine=about, settings=to_plain(settings), rows=rows, check=check, seconds=took, notes=notes)


ON_GPU = (
    "On a GPU the laps of layers are CUDA graphs, replayed: no Python and no autograd; backward is dX, dW and the "
    "gradient of the bias, called directly. Steps of GPTs run eagerly, Python included."
)


def _look_at_gpu(device: torch.device) -> float:
    """Median milliseconds of a dense bf16 product of fixed size."""
    a, b = (torch.ones(GPU_SIDE, GPU_SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    laps = interleaved([[timed_on(device, lambda: a @ b, [])]], budget_s=REFERENCE_S, rounds=1000)
    return statistics.median(laps[0][0])


def _look(settings: Settings) -> tuple[float, probe.Ceilings]:
    """Median milliseconds of a dense product of fixed size, and the probe: to tell whether the machine holds still."""
    tokens = settings.tokens[0]
    x, _ = random_batch((1024, 1024), tokens, torch.Generator().manual_seed(0))
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    laps = interleaved([[lambda: x.detach() @ weight.T]], budget_s=REFERENCE_S, rounds=1000)
    isas = [isa for isa in dict.fromkeys((library.isa(), probe.dense_isa())) if isa]
    return statistics.median(laps[0][0]), probe.measure(isas, seconds=PROBE_S)


def _ceiling(row: Row, check: Check) -> float | None:
    """What the probe reached with the arithmetic that a row's kernels may use; of plain torch, that of dense torch."""
    own = row.contender == "rarefy" and row.kernels in library.isas()
    if own:
        tiles = row.kernels == "amx" and row.dtype != "fp32" and row.block in TILED_BLOCKS
        return check.peak(row.dtype, row.kernels, tiles=tiles)
    return check.peak(row.dtype, probe.dense_isa(), tiles=row.contender == DENSE and probe.dense_has_tiles())


TILED_BLOCKS = ((8, 8), (16, 16))
"""Block shapes that have AMX kernels."""


# -- how the time is shared -------------------------------------------------------------------------------------------

APART_SHARE = 0.25
"""Part of a layer's time that goes to peers that need rounds of their own."""

LEAST_S = 0.3
"""A small layer's share would be a few rounds; it gets this long."""


@dataclass(frozen=True)
class Job:
    """Something to be timed in rounds of its own."""

    kind: str
    """layer, apart (peers with threads of their own), gpt, conv or cnn."""
    shape: Pair
    tokens: int
    budget_s: float
    conv: Conv | None = None
    cnn: str = ""

    @property
    def name(self) -> str:
        """For people who wait."""
        if self.conv is not None or self.cnn:
            return self.cnn if self.conv is None else self.conv.name
        size = "x".join(map(str, self.shape))
        return (
            f"GPT {size}"
            if self.kind == "gpt"
            else f"{size}, {self.tokens} tokens" + (", peers" if self.kind == "apart" else "")
        )


def _jobs(settings: Settings, *, with_apart: bool) -> list[Job]:
    """Layers, peers, GPTs, each with a share of the time by the FLOPs of its dense side."""
    work: list[tuple[str, Pair, int, float]] = []
    for kind, share in (("layer", 1 - APART_SHARE if with_apart else 1.0), ("apart", APART_SHARE)):
        for rows, cols in settings.shapes if kind == "layer" or with_apart else ():
            work += [(kind, (rows, cols), tokens, share * rows * cols * tokens) for tokens in settings.tokens]
    for width, layers in settings.gpt:
        work.append(("gpt", (width, layers), settings.step_tokens, 12 * width * width * layers * settings.step_tokens))
    whole = sum(size for *_, size in work)
    spare_s = max(0.0, settings.seconds - 2 * (PROBE_S + REFERENCE_S))
    image_work = [
        *(("conv", conv, "", _conv_flops(conv, settings.images)) for conv in settings.convs),
        *(("cnn", None, name, CNN_FLOPS[name] * settings.images) for name in settings.cnns),
    ]
    whole += sum(size for *_, size in image_work)
    jobs = [Job(kind, shape, tokens, max(LEAST_S, spare_s * size / whole)) for kind, shape, tokens, size in work]
    return jobs + [
        Job(kind, (0, 0), settings.images, max(LEAST_S, spare_s * size / whole), conv, name)
        for kind, conv, name, size in image_work
    ]


CNN_FLOPS = {"wrn16x2": 1.0e8, "wrn22x2": 1.6e8, "wrn28x10": 5.2e9, "resnet18": 5.6e8}
"""Multiplications of one image forward, roughly: they only share out the time."""


def _conv_flops(conv: Conv, images: int) -> float:
    return math.prod(conv.matrix) * (conv.side / conv.stride) ** 2 * images


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
