"""A layer timed in several precisions in turn: the points that the model is fitted on, and checked on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from rarefy.cost.layers import dense_layer, in_precision, random_batch, sparse_layer
from rarefy.cost.model import Timed
from rarefy.cost.points import Point
from rarefy.cost.precision import Precision
from rarefy.cost.timing import LayerStep, interleaved
from rarefy.cost.work import Work
from rarefy.pattern import Pattern, unit_grid
from rarefy.sampling import keyed_generator


def try_layer(
    point: Point,
    block: tuple[int, int] | None,
    precisions: Sequence[Precision],
    *,
    budget_s: float,
    rounds: int = 30,
) -> list[Timed]:
    """Forward, and forward and backward, of one layer with bias and a random pattern; one entry a precision.

    Args:
        block: None: the dense layer; the density is then not used.
        budget_s: as for `interleaved`; at least three rounds are timed.
    """
    shape, density, tokens, conv = point
    generator = torch.Generator().manual_seed(int(keyed_generator(*shape, tokens).integers(2**62)))
    if block is None:
        layer, nnz = dense_layer(shape, conv=conv), shape[0] * shape[1]
    else:
        rows, cols = unit_grid(shape, block)
        units = min(max(1, round(density * rows * cols)), rows * cols)
        pattern = Pattern.with_units(shape, units, block, generator)
        layer, nnz = sparse_layer(pattern, generator, conv=conv), units * block[0] * block[1]
    x, dy = random_batch(shape, tokens, generator, conv)
    steps = [LayerStep(layer, *in_precision(x, dy, precision), precision) for precision in precisions]
    times = interleaved([[step.forward, step.backward] for step in steps], budget_s=budget_s, rounds=rounds)
    return [
        Timed(
            Work(shape, tokens, nnz, block, precision, conv),
            statistics.median(forward),
            statistics.median(map(sum, zip(forward, backward, strict=True))),
        )
        for precision, (forward, backward) in zip(precisions, times, strict=True)
    ]
