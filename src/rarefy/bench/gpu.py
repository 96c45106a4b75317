"""Layers on a GPU: sparse against cuBLAS and whatever block-sparse libraries are installed.

A lap is the work of the GPU alone: it is captured as a CUDA graph and replayed, so that no one's Python is timed, and
ends when the GPU is done. Backward is both gradients of the products and that of the bias, called directly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.bench.contender import Contender, rows, time_in_turn
from rarefy.bench.gpu_peers import GpuPeer
from rarefy.bench.layers import GROWTH_FRACTION, middle
from rarefy.bench.results import DENSE, Row
from rarefy.bench.settings import Pair, Settings
from rarefy.cost import Lap, Precision, in_precision, layer_flops, random_batch, working_in
from rarefy.init import two_four_pattern
from rarefy.nn import SparseLinear
from rarefy.ops import Index, backend, fp8, triton, two_four
from rarefy.pattern import Pattern

WARM_UP = 3
"""Runs before a capture: tiles are chosen, and memory is there."""

DENSE_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""In which dense layers are timed; fp32 comes first, as rows are compared with it."""


def kernels_on_gpu(block: Pair, device: torch.device, index: Index | None = None) -> str:
    """What runs products of such blocks, or of a pattern, there: "triton", "cuSPARSELt", "tiled" or "reference"."""
    chosen = backend.choose(torch.bfloat16, device, list(block), index).__name__
    if chosen.endswith(".two_four"):
        return "cuSPARSELt"
    return "triton" if chosen.startswith(triton.__name__) else chosen.rpartition(".")[2]


def timed_on(device: torch.device, lap: Lap, notes: list[str]) -> Lap:
    """The lap as it is timed on a device: replayed from a graph, and waited for. What cannot be captured runs as it is,
    and a note says so.
    """
    if device.type != "cuda":
        return lap

    def waited(run: Callable[[], object]) -> Lap:
        def whole() -> None:
            run()
            torch.cuda.synchronize(device)

        return whole

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            lap()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            lap()
    except Exception as error:  # another library may read back in the middle
        said = f"timed with its Python, as no graph could be captured: {str(error).strip().splitlines()[0]}"
        if said not in notes:
            notes.append(said)
        torch.cuda.synchronize(device)
        return waited(lap)
    return waited(graph.replay)


def bench_layer_on_gpu(
    shape: Pair,
    tokens: int,
    settings: Settings,
    peers: Sequence[GpuPeer],
    notes: list[str],
    *,
    device: torch.device,
    budget_s: float,
) -> list[Row]:
    """Rows of a layer: dense, ours, and the peers at the middle density."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (tensor.detach().to(device) for tensor in random_batch(shape, tokens, generator))
    at = middle(settings.densities)
    contenders = [dense_on_gpu(shape, x, dy, dtype) for dtype in DENSE_PRECISIONS]
    in_fp8 = "bf16" in settings.dtypes and fp8.why_not() is None
    if in_fp8:
        contenders.append(dense_in_fp8(shape, x, dy))
    for block in settings.blocks:
        for density in settings.densities:
            pattern = Pattern.random(shape, density, block, generator)
            layer = SparseLinear.from_pattern(pattern, generator=generator).to(device)
            for dtype in settings.dtypes:
                growth = density == at and dtype == settings.dtypes[0]
                contenders.append(sparse_on_gpu(layer, x, dy, dtype, with_growth=growth))
            if in_fp8 and triton.is_square(list(block)):
                contenders.append(sparse_in_fp8(layer, x, dy))
            if density == at:
                contenders += peers_on_gpu(peers, pattern, x, dy, notes)
    if "bf16" in settings.dtypes and two_four.why_not(device) is None:
        contenders += sparse_in_fours(shape, x, dy)
    contenders = [as_timed_on(device, contender, notes) for contender in contenders]
    times = time_in_turn(contenders, budget_s=budget_s, rounds=settings.rounds)
    return rows("layer", shape, tokens, contenders, times)


def as_timed_on(device: torch.device, contender: Contender, notes: list[str]) -> Contender:
    """The same with every lap as `timed_on` has it."""
    laps = {name: timed_on(device, lap, notes) for name, lap in contender.laps.items()}
    return dataclasses.replace(contender, laps=laps)


def _within(dtype: Precision, lap: Lap) -> Lap:
    def run() -> object:
        with working_in(dtype, autocast=False):
            return lap()

    return run


def dense_on_gpu(shape: Pair, x: Tensor, dy: Tensor, dtype: Precision) -> Contender:
    """torch's own products, of weights that have the activations' dtype already."""
    given, out = in_precision(x, dy, dtype)
    given = given.detach()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(given)
    bias = torch.zeros(shape[0]).to(given)
    laps: dict[str, Lap] = {
        "forward": lambda: F.linear(given, weight, bias),
        "backward": lambda: (out @ weight, out.T @ given, out.sum(dim=0)),
        "dx": lambda: out @ weight,
        "dw": lambda: out.T @ given,
    }
    return Contender(
        name=DENSE,
        dtype=dtype,
        kernels="torch",
        laps={name: _within(dtype, lap) for name, lap in laps.items()},
        flops=layer_flops(shape[0] * shape[1]) * x.shape[0],
    )


def sparse_on_gpu(layer: SparseLinear, x: Tensor, dy: Tensor, dtype: Precision, *, with_growth: bool) -> Contender:
    """Our products, of fp32 values."""
    given, out = in_precision(x, dy, dtype)
    given, values, index, rarefy = given.detach(), layer.values.detach(), layer.index, torch.ops.rarefy
    bias = None if layer.bias is None else layer.bias.detach()
    laps: dict[str, Lap] = {
        "forward": lambda: rarefy.spmm(values, *index, given, bias),
        "backward": lambda: rarefy.spmm_backward(values, *index, out, given, [True, True, True]),
        "dx": lambda: rarefy.spmm_t(values, *index, out),
        "dw": lambda: rarefy.sddmm(*index, out, given),
    }
    if with_growth:
        wanted = max(1, round(GROWTH_FRACTION * layer.num_units))
        laps["growth"] = lambda: rarefy.grow_candidates(*index, out, given, wanted)
    return Contender(
        name="rarefy",
        dtype=dtype,
        kernels=kernels_on_gpu(layer.block, values.device, index),
        density=layer.density,
        block=layer.block,
        laps={name: _within(dtype, lap) for name, lap in laps.items()},
        flops=layer_flops(layer.values.numel()) * x.shape[0],
    )


def dense_in_fp8(shape: Pair, x: Tensor, dy: Tensor) -> Contender:
    """torch's scaled products, forward and for the gradient of the input; that of the weight in bf16."""
    half = dense_on_gpu(shape, x, dy, "bf16")
    given, out = (tensor.detach() for tensor in in_precision(x, dy, "bf16"))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(given)
    bias = torch.zeros(shape[0]).to(given)

    def multiplied(a: Tensor, b: Tensor, a_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        """a b^T + bias."""
        (left, left_scale), (right, right_scale) = fp8.scaled(a, a_dtype), fp8.scaled(b, torch.float8_e4m3fn)
        scales = (left_scale, right_scale)
        return torch.ops.aten._scaled_mm(left, right.T, *scales, bias, out_dtype=torch.bfloat16)

    def dx() -> Tensor:
        return multiplied(out, weight.T, torch.float8_e5m2)

    laps: dict[str, Lap] = {
        "forward": lambda: multiplied(given, weight, torch.float8_e4m3fn, bias),
        "backward": lambda: (dx(), out.T @ given, out.sum(dim=0)),
        "dx": dx,
        "dw": half.laps["dw"],
    }
    return dataclasses.replace(half, dtype="fp8", laps=laps)


def sparse_in_fp8(layer: SparseLinear, x: Tensor, dy: Tensor) -> Contender:
    """As `sparse_on_gpu` in bf16, within `rarefy.ops.fp8_products`."""
    half = sparse_on_gpu(layer, x, dy, "bf16", with_growth=False)

    def within(lap: Lap) -> Lap:
        def run() -> object:
            with fp8.fp8_products():
                return lap()

        return run

    return dataclasses.replace(half, dtype="fp8", laps={name: within(lap) for name, lap in half.laps.items()})


def sparse_in_fours(shape: Pair, x: Tensor, dy: Tensor) -> list[Contender]:
    """As `sparse_on_gpu` in bf16, of two units in every four, whatever densities are asked for; none where 16 does not
    divide the layer.
    """
    if any(side % two_four.SIDE for side in shape):
        return []
    generator = torch.Generator().manual_seed(0)
    pattern = two_four_pattern(shape, shape[0] * shape[1] // 2, generator=generator)
    layer = SparseLinear.from_pattern(pattern, generator=generator).to(x.device)
    found = sparse_on_gpu(layer, x, dy, "bf16", with_growth=False)
    return [dataclasses.replace(found, name="rarefy 2:4")]


def peers_on_gpu(
    peers: Sequence[GpuPeer], pattern: Pattern, x: Tensor, dy: Tensor, notes: list[str]
) -> list[Contender]:
    """Those of the peers that can run such blocks; `notes` is told of the others."""
    found = []
    for peer in peers:
        if not peer.takes(pattern.block):
            continue
        try:
            laps = dict(peer.enter(pattern, x.to(peer.dtype), dy.to(peer.dtype)))
            for lap in laps.values():
                lap()
        except Exception as error:  # another library may fail in any way, and must not end our bench
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            notes.append(f"{peer.name} cannot run {pattern.shape[0]}x{pattern.shape[1]}: {said}")
            continue
        products = 3 if "backward" in laps else 1
        found.append(
            Contender(
                name=peer.name,
                dtype="fp16" if peer.dtype == torch.float16 else "bf16",
                kernels=peer.kernels,
                density=pattern.density,
                block=pattern.block,
                laps=laps,
                flops=layer_flops(pattern.nnz) // 3 * products * x.shape[0],
            )
        )
    return found
