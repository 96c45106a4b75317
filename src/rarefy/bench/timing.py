"""The bench itself: which laps are timed in which rounds."""

from __future__ import annotations

import contextlib
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy import ops
from rarefy.bench.peers import Entry, Peer, installed
from rarefy.bench.results import Check, Results, Row, Spread
from rarefy.cost import Lap, LayerStep, dense_layer, interleaved, kernels_for, random_batch
from rarefy.nn import SparseLinear
from rarefy.pattern import Pattern, check_density, unit_grid
from rarefy.training.machine import machine

GROWTH_FRACTION = 0.3
"""Part of the active units that growth looks for: RigL's fraction at its start."""

Shape = tuple[int, int]


def run(
    *,
    shapes: Sequence[Shape],
    densities: Sequence[float],
    blocks: Sequence[tuple[int, int]],
    tokens: int = 2048,
    threads: int | None = None,
    rounds: int = 25,
    isa: str = "auto",
    seconds: float = 30.0,
    with_peers: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Results:
    """Time sparse against dense for every shape, density and block, in this process, fp32.

    Args:
        shapes: (out_features, in_features) of layers with bias.
        densities: shares of units that exist, in (0, 1].
        blocks: unit shapes; each must divide every shape.
        tokens: rows of input.
        threads: for torch and all kernels; None: what torch uses now. Set back at the end.
        rounds: the most rounds; there are at least three.
        isa: "auto", or a name of `rarefy.ops.available()`.
        seconds: about how long it may take. At least three rounds are timed, so a slow machine takes longer.
        with_peers: also time peers that are installed, on unstructured patterns.
        progress: told what is being timed.
    Raises:
        ValueError: nothing to time, or a setting that cannot be honoured; before anything is timed.
    """
    _check(shapes, densities, blocks, tokens, threads, rounds, seconds)
    started = time.perf_counter()
    notes: list[str] = []
    rows: list[Row] = []
    with _threads(threads), ops.using(isa):
        kernels = {block: kernels_for(block) for block in blocks}  # raises for a block that a named backend lacks
        about = {**machine(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        about |= {"matmul_precision": torch.get_float32_matmul_precision()}
        peers = installed(torch.get_num_threads(), notes) if with_peers else []
        apart = [peer for peer in peers if peer.own_threads]
        budget = _Budget(seconds, shapes, 1.0 - PEERS_SHARE if apart else 1.0)
        progress("dense reference")
        first_ms = _reference_ms(tokens)
        for shape in shapes:
            progress("x".join(map(str, shape)))
            beside = [peer for peer in peers if not peer.own_threads]
            rows += _bench_shape(shape, densities, kernels, beside, tokens, rounds, budget.of(shape))
        budget = _Budget(seconds, shapes, PEERS_SHARE)
        for shape in shapes if apart else ():
            progress("x".join(map(str, shape)) + ", peers")
            rows += _bench_apart(shape, densities, apart, tokens, rounds, budget.of(shape))
        check = Check(first_ms, _reference_ms(tokens))
    settings = {
        "shapes": [list(shape) for shape in shapes],
        "densities": list(densities),
        "blocks": [list(block) for block in blocks],
        "tokens": tokens,
        "rounds": rounds,
        "isa": isa,
        "seconds": seconds,
        "dtype": "float32",
    }
    took = time.perf_counter() - started
    return Results(machine=about, settings=settings, rows=rows, check=check, seconds=took, notes=notes)


def _check(
    shapes: Sequence[Shape],
    densities: Sequence[float],
    blocks: Sequence[tuple[int, int]],
    tokens: int,
    threads: int | None,
    rounds: int,
    seconds: float,
) -> None:
    for name, given in (("shapes", shapes), ("densities", densities), ("blocks", blocks)):
        if not given:
            raise ValueError(f"{name} is empty: there is nothing to time")
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"a layer needs at least one row and one column, got {shape[0]}x{shape[1]}")
        for block in blocks:
            unit_grid(shape, block)
    for density in densities:
        check_density(density)
    for name, count in (("tokens", tokens), ("rounds", rounds), ("threads", 1 if threads is None else threads)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds:g}")


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


PEERS_SHARE = 0.3
"""Part of the time that goes to peers that need rounds of their own."""


@dataclass(frozen=True)
class _Budget:
    """Seconds shared over shapes by their size, less what the references take."""

    seconds: float
    shapes: Sequence[Shape]
    share: float

    def of(self, shape: Shape) -> float:
        whole = sum(rows * cols for rows, cols in self.shapes)
        return max(0.0, self.seconds - 2 * REFERENCE_S) * self.share * shape[0] * shape[1] / whole


REFERENCE_S = 0.5


def _reference_ms(tokens: int) -> float:
    """Median milliseconds of a dense product of fixed size, to tell whether the machine holds still."""
    x, _ = random_batch((1024, 1024), tokens, torch.Generator().manual_seed(0))
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    laps = interleaved([[lambda: x.detach() @ weight.T]], budget_s=REFERENCE_S, rounds=1000)
    return statistics.median(laps[0][0])


@dataclass(frozen=True)
class _Timed:
    """One of our layers: its laps in the order forward, backward, dx, dw and, if it is timed, growth."""

    density: float
    block: tuple[int, int]
    laps: list[Lap]


def _dense(layer: nn.Linear, x: Tensor, dy: Tensor) -> list[Lap]:
    step, weight, data = LayerStep(layer, x, dy), layer.weight.detach(), x.detach()
    return [step.forward, step.backward, lambda: dy @ weight, lambda: dy.T @ data]


def _sparse(pattern: Pattern, x: Tensor, dy: Tensor, generator: torch.Generator, *, with_growth: bool) -> _Timed:
    layer = SparseLinear.from_pattern(pattern, generator=generator)
    step, values, data, index = LayerStep(layer, x, dy), layer.values.detach(), x.detach(), layer.index
    rarefy, wanted = torch.ops.rarefy, max(1, round(GROWTH_FRACTION * pattern.num_units))
    laps: list[Lap] = [
        step.forward,
        step.backward,
        lambda: rarefy.spmm_t(values, *index, dy),
        lambda: rarefy.sddmm(*index, dy, data),
    ]
    if with_growth:
        laps.append(lambda: rarefy.grow_candidates(*index, dy, data, wanted))
    return _Timed(pattern.density, pattern.block, laps)


def _bench_shape(
    shape: Shape,
    densities: Sequence[float],
    kernels: dict[tuple[int, int], str],
    peers: Sequence[Peer],
    tokens: int,
    rounds: int,
    budget_s: float,
) -> list[Row]:
    """Dense, every density and block, and at one density the peers on torch's threads, all in the same rounds."""
    generator = torch.Generator().manual_seed(0)
    x, dy = random_batch(shape, tokens, generator)
    dense = _dense(dense_layer(shape), x, dy)
    patterns = {(b, d): Pattern.random(shape, d, b, generator) for b in kernels for d in densities}
    middle = sorted(densities)[len(densities) // 2]  # growth and such peers are long: at one density they are enough
    ours = [_sparse(p, x, dy, generator, with_growth=density == middle) for (_, density), p in patterns.items()]
    entries = [(peer, peer.enter(Pattern.random(shape, middle, 1, generator), x, dy)) for peer in peers]
    groups = [dense, *(timed.laps for timed in ours), *(entry.laps for _, entry in entries)]
    times = interleaved(groups, budget_s=budget_s, rounds=rounds)
    dense_times, our_times, peer_times = times[0], times[1 : 1 + len(ours)], times[1 + len(ours) :]
    rows = [_dense_row(shape, dense_times)]
    rows += [
        _our_row(shape, timed, kernels[timed.block], laps, dense_times)
        for timed, laps in zip(ours, our_times, strict=True)
    ]
    rows += [
        _peer_row(shape, peer, entry, laps, dense_times)
        for (peer, entry), laps in zip(entries, peer_times, strict=True)
    ]
    return rows


def _bench_apart(
    shape: Shape, densities: Sequence[float], peers: Sequence[Peer], tokens: int, rounds: int, budget_s: float
) -> list[Row]:
    """Peers that bring their own threads, against a dense layer in their rounds."""
    generator = torch.Generator().manual_seed(0)
    x, dy = random_batch(shape, tokens, generator)
    step = LayerStep(dense_layer(shape), x, dy)
    entries = [(p, p.enter(Pattern.random(shape, d, 1, generator), x, dy)) for p in peers for d in densities]
    groups: list[list[Lap]] = [[step.forward, step.backward], *(entry.laps for _, entry in entries)]
    dense_times, *peer_times = interleaved(groups, budget_s=budget_s, rounds=rounds)
    return [
        _peer_row(shape, peer, entry, laps, dense_times)
        for (peer, entry), laps in zip(entries, peer_times, strict=True)
    ]


def _sum(*laps: Sequence[float]) -> list[float]:
    return [sum(parts) for parts in zip(*laps, strict=True)]


def _dense_row(shape: Shape, times: list[list[float]]) -> Row:
    forward, backward, dx, dw = times
    return Row(
        shape=shape,
        contender="dense",
        kernels="torch",
        density=1.0,
        block=(1, 1),
        rounds=len(forward),
        forward_ms=Spread.of(forward),
        dx_ms=Spread.of(dx),
        dw_ms=Spread.of(dw),
        total_ms=Spread.of(_sum(forward, backward)),
    )


def _our_row(shape: Shape, timed: _Timed, kernels: str, times: list[list[float]], dense: list[list[float]]) -> Row:
    forward, backward, dx, dw, *growth = times
    total, dense_total = _sum(forward, backward), _sum(dense[0], dense[1])
    return Row(
        shape=shape,
        contender="rarefy",
        kernels=kernels,
        density=timed.density,
        block=timed.block,
        rounds=len(forward),
        forward_ms=Spread.of(forward),
        dx_ms=Spread.of(dx),
        dw_ms=Spread.of(dw),
        total_ms=Spread.of(total),
        dense_ms=Spread.of(dense_total),
        speedup=Spread.of_ratio(dense_total, total),
        growth_ms=Spread.of(growth[0]) if growth else None,
        growth_ratio=Spread.of_ratio(growth[0], dense[3]) if growth else None,
    )


def _peer_row(shape: Shape, peer: Peer, entry: Entry, times: list[list[float]], dense: list[list[float]]) -> Row:
    forward = times[0]
    total = _sum(forward, times[1]) if entry.has_backward else forward
    dense_same = _sum(dense[0], dense[1]) if entry.has_backward else dense[0]
    return Row(
        shape=shape,
        contender=peer.name,
        kernels=peer.kernels,
        density=entry.density,
        block=(1, 1),
        rounds=len(forward),
        forward_ms=Spread.of(forward),
        total_ms=Spread.of(total) if entry.has_backward else None,
        dense_ms=Spread.of(dense_same),
        speedup=Spread.of_ratio(dense_same, total),
        forward_only=not entry.has_backward,
    )
