"""The fallback in plain torch: a few unit rows at a time become a dense tile, and torch's own matmul does the rest.

Runs wherever torch does, in any floating dtype, deterministically on CPU. Time is that of the dense product; memory is
O(tile + activations), which a gather over nonzeros (nnz x batch) is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.ops.index import Index
from rarefy.ops.spread import dense_gradient, groups_in

TILE_ENTRIES = 1 << 20
"""Entries of a dense tile: 4 MiB in fp32, about an L2 cache, and far below any layer worth making sparse."""


class Tile(NamedTuple):
    """Unit rows [first, last) and the positions [begin, end) of their units in pattern order."""

    first: int
    last: int
    begin: int
    end: int


def tiles(index: Index, entries: int = TILE_ENTRIES, groups: int = 1) -> Iterator[Tile]:
    """Consecutive tiles that cover all unit rows.

    Args:
        groups: equal groups of rows; a tile lies in one of them, or is several whole ones.
    """
    num_rows = index.crow.shape[0] - 1
    each = max(1, num_rows // groups)
    step = max(1, entries // max(1, index.block[0] * index.in_features))
    if step < each:
        firsts = [begin + at for begin in range(0, num_rows, each) for at in range(0, each, step)]
    else:
        firsts = list(range(0, num_rows, step // each * each))
    pointers = [*index.crow[firsts].tolist(), index.num_units]
    for at, (first, last) in enumerate(itertools.pairwise([*firsts, num_rows])):
        yield Tile(first, last, pointers[at], pointers[at + 1])


def groups_of_tile(tile: Tile, num_rows: int, groups: int) -> tuple[int, int]:
    """The first of the groups that a tile has rows of, and the one past the last."""
    each = max(1, num_rows // groups)
    return tile.first // each, -(-tile.last // each)


def positions(index: Index, tile: Tile) -> Tensor:
    """(units of the tile,) flat row-major unit indices, counted from the tile's first row."""
    counts = torch.diff(index.crow[tile.first : tile.last + 1].long())
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return rows * (index.t_crow.shape[0] - 1) + index.cols[tile.begin : tile.end].long()


def dense_tile(values: Tensor, index: Index, tile: Tile) -> Tensor:
    """(rows of the tile in entries, I)."""
    num_rows, num_cols, (b_r, b_c) = tile.last - tile.first, index.t_crow.shape[0] - 1, index.block
    units = values.new_zeros(num_rows * num_cols, b_r * b_c)
    units[positions(index, tile)] = values[tile.begin : tile.end].reshape(-1, b_r * b_c)
    return units.view(num_rows, num_cols, b_r, b_c).transpose(1, 2).reshape(num_rows * b_r, num_cols * b_c)


def unit_scores(gradient: Tensor, block: list[int]) -> Tensor:
    """(unit rows, unit columns) mean magnitude of each unit of a dense matrix of whole units, in float32."""
    if block == [1, 1]:
        return gradient.abs().to(torch.float32)
    rows, cols = gradient.shape[0] // block[0], gradient.shape[1] // block[1]
    return gradient.abs().reshape(rows, block[0], cols, block[1]).mean(dim=(1, 3)).to(torch.float32)


def _columns(tile: Tile, index: Index) -> slice:
    return slice(tile.first * index.block[0], tile.last * index.block[0])


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    y = x.new_empty(x.shape[0], index.out_features)
    x = x.to(values.dtype)
    for tile in tiles(index):
        rows = _columns(tile, index)
        product = x @ dense_tile(values, index, tile).T
        y[:, rows] = product if bias is None else product + bias[rows]
    return y


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    dx = values.new_zeros(dy.shape[0], index.in_features)
    for tile in tiles(index):
        dx += dy[:, _columns(tile, index)].to(values.dtype) @ dense_tile(values, index, tile)
    return dx.to(dy.dtype)


def gradient_tiles(index: Index, dy: Tensor, x: Tensor, entries: int = TILE_ENTRIES) -> Iterator[tuple[Tile, Tensor]]:
    """The dense weight gradient dy^T x, a few unit rows at a time: (tile, (rows in entries, I)).

    x (B, G I) is that of groups of rows (`rarefy.ops.spread`).
    """
    groups, num_rows = groups_in(index, x), index.crow.shape[0] - 1
    for tile in tiles(index, entries, groups):
        first, last = groups_of_tile(tile, num_rows, groups)
        inputs = slice(first * index.in_features, last * index.in_features)
        yield tile, dense_gradient(dy[:, _columns(tile, index)], x[:, inputs], last - first)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    return gather(index, gradient_tiles(index, dy, x), x)


def gather(index: Index, gradients: Iterator[tuple[Tile, Tensor]], like: Tensor) -> Tensor:
    """The entries of a dense matrix at the units, in the shape of values and the dtype of `like`."""
    b_r, b_c = index.block
    gradient = like.new_empty(index.num_units, b_r * b_c)
    for tile, dense in gradients:
        units = dense.view(tile.last - tile.first, b_r, -1, b_c).transpose(1, 2).reshape(-1, b_r * b_c)
        gradient[tile.begin : tile.end] = units[positions(index, tile)]
    return gradient.flatten() if index.block == [1, 1] else gradient.view(-1, b_r, b_c)


def best_absent(index: Index, scored_tiles: Iterator[tuple[Tile, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best absent units over all tiles: (units, scores), best first, ties by lower unit index (rewiring rule
    6.2).

    Args:
        scored_tiles: in ascending order of rows, (tile, (unit rows, unit columns) float32 scores).

    Keeps at most k of what it has seen: the best so far stay sorted by unit, so a stable sort by score orders ties.
    """
    num_cols = index.t_crow.shape[0] - 1
    units = index.crow.new_empty(0, dtype=torch.int64)
    scores = torch.empty(0, dtype=torch.float32, device=index.crow.device)
    threshold = -torch.inf
    for tile, tile_scores in scored_tiles:
        tile_scores = torch.nan_to_num(
            tile_scores.flatten(), nan=torch.inf, posinf=torch.inf
        )  # shows among the best: rule 8.3 needs to see it
        wanted = tile_scores >= threshold  # equals stay: a lower unit may still be among them
        wanted[positions(index, tile)] = False
        found = wanted.nonzero().flatten()
        units = torch.cat([units, found + tile.first * num_cols])
        scores = torch.cat([scores, tile_scores[found]])
        if scores.numel() > k:
            best = torch.sort(scores, descending=True, stable=True).indices[:k]
            threshold = float(scores[best[-1]]) if k else torch.inf
            best = torch.sort(best).values
            units, scores = units[best], scores[best]
    order = torch.sort(scores, descending=True, stable=True).indices[:k]
    return units[order], scores[order]


def grow_candidates(
    index: Index, dy: Tensor, x: Tensor, k: int, score: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `rarefy.ops.schema`. `score` turns a tile of the gradient into (unit rows, unit columns); default: mean
    |g|.
    """
    scored = (
        (tile, unit_scores(dense, index.block) if score is None else score(dense))
        for tile, dense in gradient_tiles(index, dy, x, TILE_ENTRIES // 4)
    )
    return best_absent(index, scored, k)
