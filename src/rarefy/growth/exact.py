"""The exact dense gradient of the step (rewiring rules 6.2 to 6.4): what RigL's paper grows by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.growth.signal import (
    Collector,
    Found,
    GrowScore,
    Request,
    Signal,
    active_units,
    grid_scores,
    scan,
    unit_scores,
)
from rarefy.ops import tiled
from rarefy.ops.index import Index
from rarefy.ops.rows import RowScores, best_in_rows, tiles_of
from rarefy.ops.spread import dense_gradient, groups_in, sddmm


@dataclass(frozen=True, kw_only=True)
class Exact(Signal):
    """All of the step's rows. A scan costs 1.5 to 1.7 times a dense weight gradient of the layer (docs/methods.md).

    One backward call on one rank is streamed, in O(k + tile) memory. With several calls or ranks the dense gradient
    exists for this step, and is all-reduced.
    """

    def collector(self, request: Request) -> Collector:
        """See `Signal`."""
        streams = request.ranks.world_size() == 1 and request.calls == 1
        if request.row_capacity:
            return BestPerRow(request) if streams else DenseRows(request)
        return BestUnits(request) if streams else DenseGradient(request)

    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """See `Signal`; where it cannot stream."""
        return 4 * shape[0] * shape[1]


class BestUnits(Collector):
    """The k best absent units of one backward call, streamed: memory O(k + tile) (rule 6.3).

    If units may return, the gradient of those that exist is kept too, O(nnz).
    """

    combines = False  # the earlier activations are gone

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._units = torch.empty(0, dtype=torch.int64)
        self._scores = torch.empty(0)
        self._active_gradient: Tensor | None = None

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        # Calls of one step cannot be combined: the engine then leaves the rewire out, and accumulates the next time.
        self._units, self._scores = scan(index, dy, x, self.request, self.request.grow_score)
        if self.request.returns:
            self._active_gradient = sddmm(index, dy, x)

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        active = self._active_gradient
        return Found(self._units, self._scores, None if active is None else unit_scores(active, grow_score))


class DenseGradient(Collector):
    """The dense gradient of the layer, summed over the step's backward calls: O * I floats for this one step (rule
    6.4).
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.gradient: Tensor | None = None

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        gradient = dense_gradient(dy, x, groups_in(index, x))
        self.gradient = gradient if self.calls == 1 or self.gradient is None else self.gradient.add_(gradient)

    def everywhere(self, index: Index, grow_score: GrowScore | None) -> Tensor:
        """(unit rows, unit columns) scores, the same on all ranks."""
        assert self.gradient is not None
        gradient = self.request.ranks.mean_over_ranks(self.gradient)  # a sum over calls orders as their mean does
        return grid_scores(gradient, index.block, grow_score)

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        everywhere = self.everywhere(index, grow_score).flatten()
        active = active_units(index)
        absent = torch.ones_like(everywhere, dtype=torch.bool)
        absent[active] = False
        units = absent.nonzero().flatten()
        return Found(units, everywhere[units], everywhere[active] if self.request.returns else None)


class BestPerRow(Collector):
    """As `BestUnits`, and the best of every row besides: memory O(k + rows * capacity + tile) (rule 6.3)."""

    combines = False

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._rows: RowScores | None = None

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        scored = (
            (tile, grid_scores(dense, index.block, self.request.grow_score))
            for tile, dense in tiled.gradient_tiles(index, dy, x, tiled.TILE_ENTRIES // 4)
        )
        self._rows = best_in_rows(index, scored, self.request.k, self.request.row_capacity)

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        assert self._rows is not None
        return _with_rows(self._rows)


class DenseRows(DenseGradient):
    """As `DenseGradient`, and the best of every row besides."""

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        tiles = tiles_of(index, self.everywhere(index, grow_score))
        return _with_rows(best_in_rows(index, tiles, self.request.k, self.request.row_capacity))


def _with_rows(rows: RowScores) -> Found:
    return Found(rows.units, rows.scores, rows.active, rows)
