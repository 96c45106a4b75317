"""A layer's milliseconds, sparse beside dense: timed on the spot in turn, or as a model predicts them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from rarefy.cost.convolution import Convolution
from rarefy.cost.layers import dense_layer, in_precision, random_batch, sparse_layer
from rarefy.cost.model import CostModel
from rarefy.cost.precision import PRECISIONS, Precision, dense_precisions, precision_now
from rarefy.cost.timing import LayerStep, interleaved_ms, kernels_for
from rarefy.cost.work import Work, dense_work
from rarefy.nn import SparseLinear, SparseLowRank
from rarefy.pattern import Pattern, unit_grid
from rarefy.sampling import keyed_generator

Source = Literal["measured", "predicted"]


@dataclass(frozen=True)
class LayerCost:
    """Milliseconds of one forward and backward (input, weight and bias gradient), on this machine."""

    sparse_ms: float | None
    """None: only the dense layer was timed, since nothing would make it sparse."""

    dense_ms: float

    source: Source = "measured"
    """Medians of timings on the spot, or what the cost model predicts."""

    precision: Precision = "fp32"
    """Of both."""

    others: Mapping[str, float] = field(default_factory=dict)
    """The same layer in the other precisions: "sparse bf16" or "dense bf16" -> milliseconds."""

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.sparse_ms is None else self.dense_ms / self.sparse_ms

    def ms(self, storage: str, precision: Precision) -> float | None:
        """Of the layer "sparse" or "dense" in one precision; None where it is not known."""
        if precision == self.precision:
            return self.sparse_ms if storage == "sparse" else self.dense_ms
        return self.others.get(f"{storage} {precision}")


def measure(
    shape: tuple[int, int],
    units: int | None,
    block: tuple[int, int],
    tokens: int,
    *,
    bias: bool = True,
    precisions: bool = False,
    rank: int = 0,
    conv: Convolution | None = None,
) -> LayerCost:
    """Time a layer of this shape, sparse and dense in turn, in this process with torch's threads. From 0.3 s, by size.

    The pattern is random, as at the start of training. The same question under the same threads, precision and kernels
    is timed once a process, with `units` rounded to three figures: layers that share a budget differ by one. Torch's
    random state is left as it is.

    Args:
        units: None: time the dense layer alone.
        rank: of a low-rank part beside the units, timed with them.
        precisions: time the layer in the other precisions as well, in the same rounds: two to three times as long.
        conv: a convolution; `tokens` are then its pixels. None: a linear layer.
    """
    rounded = None
    if units is not None:
        rows, cols = unit_grid(shape, block)
        rounded = min(int(float(f"{units:.3g}")), rows * cols)
    now = precision_now()
    conditions = (torch.get_num_threads(), kernels_for(block) if units is not None else "")
    return _measure(shape, rounded, block, tokens, bias, precisions, rank, conv, now, *conditions)


def measure_dense(shape: tuple[int, int], tokens: int, *, bias: bool = True) -> float:
    """Median milliseconds of the dense layer alone, forward and backward: for layers that no plan would make sparse."""
    return measure(shape, None, (1, 1), tokens, bias=bias).dense_ms


@functools.lru_cache(maxsize=512)
def _measure(
    shape: tuple[int, int],
    units: int | None,
    block: tuple[int, int],
    tokens: int,
    bias: bool,
    precisions: bool,
    rank: int,
    conv: Convolution | None,
    now: Precision,
    *conditions: Any,
) -> LayerCost:
    generator = torch.Generator().manual_seed(int(keyed_generator(*shape, units or 0).integers(2**62)))
    x, dy = random_batch(shape, tokens, generator, conv)
    steps: dict[tuple[str, Precision], LayerStep] = {}
    if units is not None:
        pattern = Pattern.with_units(shape, units, block, generator)
        sparse: nn.Module = sparse_layer(pattern, generator, bias, conv)
        if rank:
            assert isinstance(sparse, SparseLinear)
            sparse = SparseLowRank.around(sparse, rank=rank, generator=generator)
        steps |= {("sparse", p): _step(sparse, x, dy, p) for p in _asked(now, PRECISIONS, precisions)}
    dense = dense_layer(shape, bias, conv)
    steps |= {("dense", p): _step(dense, x, dy, p) for p in _asked(now, dense_precisions(), precisions)}
    times = dict(zip(steps, interleaved_ms(list(steps.values()), budget_s=0.15 * len(steps)), strict=True))
    sparse_ms, dense_ms = times.pop(("sparse", now), None), times.pop(("dense", now))
    return LayerCost(sparse_ms, dense_ms, "measured", now, {" ".join(name): ms for name, ms in times.items()})


def _asked(now: Precision, possible: tuple[Precision, ...], every: bool) -> list[Precision]:
    """The precision that torch is set to, and if wanted the others."""
    return [now, *(p for p in possible if every and p != now)]


def _step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, precision: Precision) -> LayerStep:
    return LayerStep(layer, *in_precision(x, dy, precision), precision)


def predict(
    model: CostModel,
    shape: tuple[int, int],
    units: int | None,
    block: tuple[int, int],
    tokens: int,
    *,
    rank: int = 0,
    conv: Convolution | None = None,
) -> LayerCost | None:
    """What the model says of a layer, sparse and dense, in every precision that it knows.

    Args:
        units: None: of the dense layer alone.
        rank: of a low-rank part beside the units, taken as two thin dense layers.
        conv: a convolution, predicted on channels_last images; None: a linear layer.
    Returns:
        None if the model does not know the structure, or the dense layer in the precision that torch is set to.
    """
    now = precision_now()
    nnz = None if units is None else units * block[0] * block[1]
    times: dict[tuple[str, Precision], float | None] = {
        ("dense", p): model.ms(dense_work(shape, tokens, p, conv)) for p in PRECISIONS
    }
    if nnz is not None:
        for p in PRECISIONS:
            works = [Work(shape, tokens, nnz, block, p, conv)]
            if rank:
                works += [dense_work((rank, shape[1]), tokens, p), dense_work((shape[0], rank), tokens, p)]
            parts = [model.ms(work) for work in works]
            known = [ms for ms in parts if ms is not None]
            times["sparse", p] = sum(known) if len(known) == len(parts) else None
    dense_ms, sparse_ms = times.pop(("dense", now)), times.pop(("sparse", now), None)
    if dense_ms is None or (nnz is not None and sparse_ms is None):
        return None
    others = {" ".join(name): ms for name, ms in times.items() if ms is not None}
    return LayerCost(sparse_ms, dense_ms, "predicted", now, others)


BREAK_EVEN_STEPS = 200
"""Densities looked at, evenly spaced up to 1."""


def break_even(
    model: CostModel, shape: tuple[int, int], block: tuple[int, int], tokens: int, conv: Convolution | None = None
) -> float | None:
    """The largest density at which the model expects a sparse training step to be faster than a dense one.

    In the precision that torch is set to. Densities past the calibrated ones are extrapolated.

    Returns:
        0.0: at no density. None if the model does not know the structure or the dense layer.
    """
    now = precision_now()
    dense_ms = model.ms(dense_work(shape, tokens, now, conv))
    rows, cols = unit_grid(shape, block)
    best = 0.0
    for step in range(1, BREAK_EVEN_STEPS + 1):
        density = step / BREAK_EVEN_STEPS
        nnz = round(density * rows * cols) * block[0] * block[1]
        sparse_ms = model.ms(Work(shape, tokens, nnz, block, now, conv))
        if dense_ms is None or sparse_ms is None:
            return None
        if sparse_ms < dense_ms:
            best = density
    return best
