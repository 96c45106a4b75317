"""The best absent units of every row of a dense gradient, for methods that grow row by row.

R unit rows, C unit columns, K active units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.ops import tiled
from rarefy.ops.index import Index
from rarefy.ops.tiled import Tile


@dataclass(frozen=True)
class RowScores:
    """What is kept of the scores of a whole matrix: O(K + k + R * capacity)."""

    units: Tensor
    """(k,) or fewer absent units of the highest scores of all, best first; ties: lower unit first (rule 6.2)."""
    scores: Tensor
    """Theirs."""
    active: Tensor
    """(K,) scores of the active units."""
    row_cols: Tensor
    """(R, capacity) columns of each row's best absent units, best first; ties: lower column first."""
    row_scores: Tensor
    """(R, capacity) theirs; -inf where a row has no more absent units."""
    finite: bool
    """Whether all scores were, those that were not kept too (rule 8.3)."""


def best_in_rows(index: Index, scored_tiles: Iterator[tuple[Tile, Tensor]], k: int, capacity: int) -> RowScores:
    """One pass over (tile, (unit rows, unit columns) float32 scores), in ascending order of rows."""
    num_rows, num_cols = index.crow.shape[0] - 1, index.t_crow.shape[0] - 1
    capacity = min(capacity, num_cols)
    device = index.crow.device
    active = torch.empty(index.num_units, dtype=torch.float32, device=device)
    row_cols = torch.empty(num_rows, capacity, dtype=torch.int64, device=device)
    row_scores = torch.empty(num_rows, capacity, dtype=torch.float32, device=device)

    finite = True

    def absent_tiles() -> Iterator[tuple[Tile, Tensor]]:
        nonlocal finite
        for tile, given in scored_tiles:
            finite = finite and bool(torch.isfinite(given).all())
            scores = torch.nan_to_num(given.to(torch.float32))
            at = tiled.positions(index, tile)
            active[tile.begin : tile.end] = scores.flatten()[at]
            scores.view(-1)[at] = -torch.inf
            # One integer orders by (score, -column), which a selection of equal floats would not.
            best = (_ordered(scores) - torch.arange(num_cols, device=device)).topk(capacity, dim=1)
            row_cols[tile.first : tile.last] = best.indices
            row_scores[tile.first : tile.last] = scores.gather(1, best.indices)
            yield tile, scores

    units, scores = tiled.best_absent(index, absent_tiles(), k)
    return RowScores(units, scores, active, row_cols, row_scores, finite)


def _ordered(scores: Tensor) -> Tensor:
    """int64 that order as the floats do, with 32 bits free below; -0.0 as 0.0."""
    bits = (scores + 0.0).contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32


def tiles_of(index: Index, scores: Tensor) -> Iterator[tuple[Tile, Tensor]]:
    """The tiles of (R, C) scores that exist already."""
    for tile in tiled.tiles(index, tiled.TILE_ENTRIES // 4):
        yield tile, scores[tile.first : tile.last]
