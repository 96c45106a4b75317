"""Link prediction on the bipartite graph of a layer's units: which absent link would close the most three-step paths.

Cannistraci-Hebb rules, node-based (Zhang et al. 2025, arXiv:2501.19107, and the authors' code). For an absent link of
row i and column t, each column s of row i and each row j of column t that lie on a path i - s - j - t count once. With
I its links to the others on such paths, and E its links beside those and the one to i or t itself:

    CH2: (1 + I) / (1 + E)          CH3: 1 / (1 + E)

For s, I is the number c_ts of rows that columns s and t share, and 1 + E = degree(s) - c_ts; for j likewise. So all
scores are products of the sparse matrix with dense ones: one link costs as many additions as a side has lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rarefy.ops import Index, links
from rarefy.pattern import Pattern

Rule = Literal["ch2", "ch3"]

TILE_ENTRIES = 1 << 22
"""Entries of the largest dense matrix held at once: 16 MiB."""

CACHED_ENTRIES = 1 << 19
"""Entries of a tile that stays in the cores' caches from one pass over it to the next."""


class LinkScores(NamedTuple):
    """Scores of some lines of the grid, those of links that exist included (without a meaning)."""

    first: int
    """The first of the lines."""
    scores: Tensor
    """(lines, other side) float32, not negative."""


class Grid(NamedTuple):
    """The graph with its shorter side as rows."""

    index: Index
    turned: bool
    """Whether its rows are the layer's columns."""
    num_short: int
    num_long: int

    def links(self) -> Tensor:
        """`by_lines` of the graph's own links."""
        counts = torch.diff(self.index.t_crow.long())
        lines = torch.repeat_interleave(torch.arange(self.num_long, device=counts.device), counts)
        return lines * self.num_short + self.index.t_rows.long()

    def by_lines(self, units: Tensor) -> Tensor:
        """Ascending row-major units of the layer to ascending line * num_short + other, lines of the longer side."""
        if self.turned:
            return units
        return torch.sort(units % self.num_long * self.num_short + units // self.num_long).values

    def to_units(self, links: Tensor) -> Tensor:
        """The way back, in the order given."""
        return links if self.turned else links % self.num_short * self.num_long + links // self.num_short


def grid_of(links: Tensor, num_rows: int, num_cols: int) -> Grid:
    """From ascending row-major units of a num_rows x num_cols layer."""
    index = Index.of(Pattern.from_sorted_units(links, (num_rows, num_cols)))
    if num_rows <= num_cols:
        return Grid(index, False, num_rows, num_cols)
    perm = torch.empty_like(index.t_perm)
    perm[index.t_perm.long()] = torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    turned = Index(index.t_crow, index.t_rows, index.crow, index.cols, perm, index.block)
    return Grid(turned, True, num_cols, num_rows)


def link_scores(grid: Grid, rule: Rule, tile_entries: int = TILE_ENTRIES) -> Iterator[LinkScores]:
    """Scores of all links, a few lines of the longer side at a time, in ascending order.

    S the shorter side, L the longer, K links: O(K (L + S) + L S) time. Memory O(K + tile): what the short side's
    pairs count for, S x S, is kept where that is at most a tile or 8 K, as `rarefy.ops.links` needs it, and else made
    anew for each tile, O(K S) each.
    """
    index, short, long = grid.index, grid.num_short, grid.num_long
    if short * short > max(tile_entries, 8 * index.num_units) or not links.available(index):
        yield from _by_products(grid, rule, tile_entries)
        return
    inside, step = rule == "ch2", max(1, min(tile_entries, CACHED_ENTRIES) // max(long, 1))
    pairs = links.link_pairs(index, inside)
    for first in range(0, long, step):
        yield LinkScores(first, links.link_scores(index, inside, pairs, first, min(first + step, long)))


def _by_products(grid: Grid, rule: Rule, tile_entries: int) -> Iterator[LinkScores]:
    """The same by products of sparse matrices with dense ones: where no kernel is, or short pairs are too many."""
    index, short, long = grid.index, grid.num_short, grid.num_long
    ones = torch.ones(index.num_units, dtype=torch.float32, device=index.crow.device)
    degree_short, degree_long = torch.diff(index.crow).float(), torch.diff(index.t_crow).float()
    step = max(1, tile_entries // max(long, 1))

    def short_pairs() -> Iterator[tuple[int, Tensor]]:
        """What row j counts for, seen from row i: (first i, (some i, all j))."""
        for first in range(0, short, step):
            mine = _lines(index.crow, index.cols, first, min(first + step, short), long)
            yield first, _share(rule, torch.ops.rarefy.spmm(ones, *index, mine), degree_short)

    with _exact_products():
        kept = list(short_pairs()) if short * short <= max(tile_entries, 8 * index.num_units) else None
        if kept is not None:
            step = max(1, min(tile_entries, CACHED_ENTRIES) // max(long, 1))
        for first in range(0, long, step):
            mine = _lines(index.t_crow, index.t_rows, first, min(first + step, long), short)
            common = torch.ops.rarefy.spmm_t(ones, *index, mine)
            scores = torch.ops.rarefy.spmm(ones, *index, _share(rule, common, degree_long))
            part = _part(grid, first, min(first + step, long))
            for begin, pairs in short_pairs() if kept is None else kept:
                counted = torch.ops.rarefy.spmm(ones[: part.num_units], *part, pairs)
                scores[:, begin : begin + pairs.shape[0]] += counted.T
            yield LinkScores(first, _rounded(scores))


def _share(rule: Rule, common: Tensor, degree: Tensor) -> Tensor:
    """(lines, others) common neighbours and (others,) degrees to what each of the others counts for."""
    linked = common.clamp(max=1)
    inside = linked.add_(common) if rule == "ch2" else linked
    return inside.div_(torch.sub(degree, common).clamp_(min=1))  # below 1 only from a line to itself


def _lines(pointers: Tensor, others: Tensor, first: int, last: int, num_others: int) -> Tensor:
    """(last - first, num_others) 0/1 float32: some rows of a compressed matrix."""
    counts = torch.diff(pointers[first : last + 1].long())
    at = torch.repeat_interleave(torch.arange(last - first, device=counts.device), counts)
    lines = torch.zeros(last - first, num_others, device=counts.device)
    lines[at, others[int(pointers[first]) : int(pointers[last])].long()] = 1
    return lines


def _part(grid: Grid, first: int, last: int) -> Index:
    """The links of some lines of the longer side, those lines being rows."""
    crow = grid.index.t_crow[first : last + 1]
    others = grid.index.t_rows[int(crow[0]) : int(crow[-1])]
    return Index.of(Pattern(crow - crow[0], others, (last - first, grid.num_short)))


def _rounded(scores: Tensor) -> Tensor:
    """To 17 bits: scores that are equal tie, whatever order they were summed in (rule 6.2)."""
    return ((scores.view(torch.int32) + 32) & ~63).view(torch.float32)


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 as it is, where the user allows bf16 for the network."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
