"""The exact gradient's best units of every row, for methods that choose row by row (`Method.row_candidates`)."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from rarefy.growth.exact import DenseGradient
from rarefy.growth.signal import Collector, Found, GrowScore, Request, grid_scores
from rarefy.ops import tiled
from rarefy.ops.index import Index
from rarefy.ops.rows import RowScores, best_in_rows, tiles_of


class RowCollector(Collector):
    """Finds the best units of each row, besides those of the layer.

    Args:
        capacity: how many of the best of a row may be wanted.
    """

    def __init__(self, request: Request, capacity: int) -> None:
        super().__init__(request)
        self.capacity = capacity

    @abstractmethod
    def rows(self, index: Index, grow_score: GrowScore | None) -> RowScores:
        """By what was seen. All ranks call it together, and all get the same."""

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        found = self.rows(index, grow_score)
        return Found(found.units, found.scores, found.active if self.request.returns else None)


class BestPerRow(RowCollector):
    """One backward call on one rank, streamed: memory O(k + rows * capacity + tile) (rule 6.3)."""

    combines = False  # the earlier activations are gone

    def __init__(self, request: Request, capacity: int) -> None:
        super().__init__(request, capacity)
        self._rows: RowScores | None = None

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        score = self.request.grow_score
        scored = (
            (tile, grid_scores(dense, index.block, score))
            for tile, dense in tiled.gradient_tiles(index, dy, x, tiled.TILE_ENTRIES // 4)
        )
        self._rows = best_in_rows(index, scored, self.request.k, self.capacity)

    def rows(self, index: Index, grow_score: GrowScore | None) -> RowScores:
        assert self._rows is not None
        return self._rows


class DenseRows(RowCollector):
    """Several calls or ranks: of the dense gradient, which exists for this step (rule 6.4)."""

    def __init__(self, request: Request, capacity: int) -> None:
        super().__init__(request, capacity)
        self._dense = DenseGradient(request)

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        self._dense.calls = self.calls
        self._dense.see(index, dy, x)

    def rows(self, index: Index, grow_score: GrowScore | None) -> RowScores:
        assert self._dense.gradient is not None
        gradient = self.request.ranks.mean_over_ranks(self._dense.gradient)
        tiles = tiles_of(index, grid_scores(gradient, index.block, grow_score))
        return best_in_rows(index, tiles, self.request.k, self.capacity)


def row_collector(request: Request, capacity: int) -> RowCollector:
    """The one that streams where it can."""
    streams = request.ranks.world_size() == 1 and request.calls == 1
    return (BestPerRow if streams else DenseRows)(request, capacity)
