"""One layer: dense in every dtype, sparse in every density, block and dtype, and peers, all in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from rarefy.bench.contender import Contender, rows, time_in_turn
from rarefy.bench.peers import Peer
from rarefy.bench.results import DENSE, Row
from rarefy.bench.settings import Pair, Settings
from rarefy.cost import (
    Lap,
    LayerStep,
    Precision,
    dense_layer,
    dense_precisions,
    in_precision,
    layer_flops,
    random_batch,
    working_in,
)
from rarefy.nn import SparseLinear
from rarefy.pattern import Pattern

GROWTH_FRACTION = 0.3
"""Part of the active units that growth looks for: RigL's fraction at its start."""


def middle(densities: Sequence[float]) -> float:
    """Where what takes long is timed, once: growth, and peers that are slow."""
    return sorted(densities)[len(densities) // 2]


def bench_layer(
    shape: Pair,
    tokens: int,
    settings: Settings,
    kernels: Mapping[Pair, str],
    peers: Sequence[Peer],
    notes: list[str],
    *,
    budget_s: float,
) -> list[Row]:
    """Rows of a layer: dense, ours, and the peers that compute on torch's threads, these at the middle density."""
    generator = torch.Generator().manual_seed(0)
    x, dy = random_batch(shape, tokens, generator)
    at = middle(settings.densities)
    contenders = dense_contenders(shape, x, dy, settings, notes)
    for block in settings.blocks:
        patterns = [Pattern.random(shape, density, block, generator) for density in settings.densities]
        layers = [SparseLinear.from_pattern(pattern, generator=generator) for pattern in patterns]
        for dtype in settings.dtypes:
            for layer, density in zip(layers, settings.densities, strict=True):
                growth = density == at and dtype == settings.dtypes[0]
                contenders.append(sparse_contender(layer, x, dy, dtype, kernels[block], with_growth=growth))
    contenders += peer_contenders(peers, shape, [at], x, dy, notes)
    return rows("layer", shape, tokens, contenders, _timed(contenders, settings, budget_s))


def bench_apart(
    shape: Pair, tokens: int, settings: Settings, peers: Sequence[Peer], notes: list[str], *, budget_s: float
) -> list[Row]:
    """Rows of peers that bring their own threads, at every density; dense layers stand in their rounds, unshown."""
    x, dy = random_batch(shape, tokens, torch.Generator().manual_seed(0))
    dense = dense_contenders(shape, x, dy, settings, notes, alone=False)
    contenders = [*dense, *peer_contenders(peers, shape, settings.densities, x, dy, notes)]
    if len(contenders) == len(dense):
        return []
    return rows("layer", shape, tokens, contenders, _timed(contenders, settings, budget_s))[len(dense) :]


def _timed(contenders: Sequence[Contender], settings: Settings, budget_s: float) -> list[dict[str, list[float]]]:
    return time_in_turn(contenders, budget_s=budget_s, rounds=settings.rounds)


def _step(layer: nn.Module, x: Tensor, dy: Tensor, dtype: Precision) -> LayerStep:
    return LayerStep(layer, *in_precision(x, dy, dtype), dtype)


def dense_contenders(
    shape: Pair, x: Tensor, dy: Tensor, settings: Settings, notes: list[str], *, alone: bool = True
) -> list[Contender]:
    """Eager fp32 first, then what else this machine runs well, compiled too if that was asked for.

    Args:
        alone: with the two gradients called alone as well.
    """
    layer, whole = dense_layer(shape), layer_flops(shape[0] * shape[1]) * x.shape[0]
    found = []
    for dtype in dense_precisions():
        step = _step(layer, x, dy, dtype)
        laps: dict[str, Lap] = {"forward": step.forward, "backward": step.backward}
        if alone:
            weight, kept = layer.weight.detach().to(step.dy.dtype), step
            laps["dx"] = _within(dtype, lambda weight=weight, kept=kept: kept.dy @ weight)
            laps["dw"] = _within(dtype, lambda kept=kept: kept.dy.T @ kept.x.detach())
        found.append(Contender(name=DENSE, dtype=dtype, kernels="torch", laps=laps, flops=whole))
    if settings.compiled:
        torch.compiler.reset()  # torch compiles the same code for a few layers only, then falls back
        for dtype in dense_precisions():
            step = compiled(lambda dtype=dtype: _step(layer_compiled(layer), x, dy, dtype), notes)
            if step is not None:
                laps = {"forward": step.forward, "backward": step.backward}
                mark = Contender(name=DENSE, dtype=dtype, compiled=True, kernels="torch", laps=laps, flops=whole)
                found.append(mark)
    return found


def layer_compiled(layer: nn.Module) -> nn.Module:
    """The module under torch.compile, which must not fall back."""
    return torch.compile(layer, fullgraph=True, dynamic=False)  # type: ignore[return-value]


S = TypeVar("S", bound=Callable[[], None])


def compiled(make: Callable[[], S], notes: list[str]) -> S | None:
    """A step over a compiled module, run once so that compiling is done; None and a note if that fails."""
    try:
        step = make()
        step()
    except Exception as error:  # whatever a compiler may lack
        said = f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
        if said not in notes:
            notes.append(said)
        return None
    return step


def sparse_contender(
    layer: SparseLinear, x: Tensor, dy: Tensor, dtype: Precision, kernels: str, *, with_growth: bool
) -> Contender:
    """Our layer: its step, and its gradients called alone."""
    step, values, index, rarefy = _step(layer, x, dy, dtype), layer.values.detach(), layer.index, torch.ops.rarefy
    data, out = step.x.detach(), step.dy
    laps: dict[str, Lap] = {
        "forward": step.forward,
        "backward": step.backward,
        "dx": _within(dtype, lambda: rarefy.spmm_t(values, *index, out)),
        "dw": _within(dtype, lambda: rarefy.sddmm(*index, out, data)),
    }
    if with_growth:
        wanted = max(1, round(GROWTH_FRACTION * layer.num_units))
        laps["growth"] = _within(dtype, lambda: rarefy.grow_candidates(*index, out, data, wanted))
    return Contender(
        name="rarefy",
        dtype=dtype,
        kernels=kernels,
        density=layer.density,
        block=layer.block,
        laps=laps,
        flops=layer_flops(layer.values.numel()) * x.shape[0],
    )


def peer_contenders(
    peers: Sequence[Peer], shape: Pair, densities: Sequence[float], x: Tensor, dy: Tensor, notes: list[str]
) -> list[Contender]:
    """Those of the peers that can run the layer; `notes` is told of the others."""
    found, generator = [], torch.Generator().manual_seed(0)
    for peer in peers:
        for density in densities:
            try:
                entry = peer.enter(Pattern.random(shape, density, peer.block, generator), x, dy)
                entry.laps["forward"]()
            except Exception as error:  # another library may fail in any way, and must not end our bench
                said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                notes.append(f"{peer.name} cannot run {shape[0]}x{shape[1]}: {said}")
                break
            nnz = round(entry.density * shape[0] * shape[1])
            products = 3 if "backward" in entry.laps else 1
            found.append(
                Contender(
                    name=peer.name,
                    kernels=peer.kernels,
                    density=entry.density,
                    block=peer.block,
                    laps=entry.laps,
                    flops=layer_flops(nnz) // 3 * products * x.shape[0],
                )
            )
    return found


def _within(dtype: Precision, lap: Lap) -> Lap:
    """The lap under the dtype's matmul precision."""

    def run() -> object:
        with working_in(dtype, autocast=False):
            return lap()

    return run
