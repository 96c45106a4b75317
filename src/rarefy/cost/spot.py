"""A layer timed on the spot, sparse beside dense in turn."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from rarefy.cost.timing import LayerStep, dense_layer, interleaved_ms, kernels_for, random_batch
from rarefy.nn import SparseLinear
from rarefy.pattern import Pattern, unit_grid
from rarefy.sampling import keyed_generator


@dataclass(frozen=True)
class LayerCost:
    """Median milliseconds of one forward and backward (input, weight and bias gradient), fp32, on this machine."""

    sparse_ms: float | None
    """None: only the dense layer was timed, since nothing would make it sparse."""

    dense_ms: float

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.sparse_ms is None else self.dense_ms / self.sparse_ms


def measure(shape: tuple[int, int], units: int, block: tuple[int, int], tokens: int, *, bias: bool = True) -> LayerCost:
    """Time a layer of this shape, sparse and dense in turn, in this process with torch's threads. From 0.3 s, by size.

    The pattern is random, as at the start of training. The same question under the same threads and kernels is timed
    once a process, with `units` rounded to three figures: layers that share a budget differ by one. Torch's random
    state is left as it is.
    """
    rows, cols = unit_grid(shape, block)
    rounded = min(int(float(f"{units:.3g}")), rows * cols)
    return _measure(shape, rounded, block, tokens, bias, torch.get_num_threads(), kernels_for(block))


def measure_dense(shape: tuple[int, int], tokens: int, *, bias: bool = True) -> float:
    """Median milliseconds of the dense layer alone, forward and backward: for layers that no plan would make sparse."""
    return _measure_dense(shape, tokens, bias, torch.get_num_threads())


@functools.lru_cache(maxsize=512)
def _measure(
    shape: tuple[int, int], units: int, block: tuple[int, int], tokens: int, bias: bool, *conditions: Any
) -> LayerCost:
    generator = torch.Generator().manual_seed(int(keyed_generator(*shape, units).integers(2**62)))
    pattern = Pattern.with_units(shape, units, block, generator)
    x, dy = random_batch(shape, tokens, generator)
    sparse = LayerStep(SparseLinear.from_pattern(pattern, bias, generator=generator), x, dy)
    dense = LayerStep(dense_layer(shape, bias), x, dy)
    sparse_ms, dense_ms = interleaved_ms([sparse, dense])
    return LayerCost(sparse_ms, dense_ms)


@functools.lru_cache(maxsize=512)
def _measure_dense(shape: tuple[int, int], tokens: int, bias: bool, *conditions: Any) -> float:
    x, dy = random_batch(shape, tokens, torch.Generator().manual_seed(0))
    return interleaved_ms([LayerStep(dense_layer(shape, bias), x, dy)], budget_s=0.15)[0]
