"""First patterns and first values (rewiring rules 3.1 and 3.2)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.pattern import Block, Pattern, as_block, unit_grid

PatternInit = Literal["random", "balanced", "butterfly", "magnitude", "constant_fan_in", "two_four"]
DrawnInit = Literal["random", "balanced", "butterfly", "constant_fan_in", "two_four"]
"""Those that need no weights."""

_DRAWN_ENTRIES = 1 << 22
"""Random numbers held at once while rows of equal fan-in are drawn."""


def drawn_pattern(
    init: DrawnInit,
    shape: Sequence[int],
    num_units: int,
    block: Block = 1,
    *,
    generator: torch.Generator | None = None,
) -> Pattern:
    """Exactly `num_units` units by one of the ways that need no weights (rules 3.1 and 2.2)."""
    if init == "butterfly":
        return butterfly_pattern(shape, num_units, block)
    draws = {
        "random": Pattern.with_units,
        "balanced": balanced_pattern,
        "constant_fan_in": constant_fan_in_pattern,
        "two_four": two_four_pattern,
    }
    return draws[init](shape, num_units, block, generator=generator)


def balanced_pattern(
    shape: Sequence[int], num_units: int, block: Block = 1, *, generator: torch.Generator | None = None
) -> Pattern:
    """Exactly `num_units` units whose row counts, and column counts, each differ by at most one (rule 3.1).

    Row by row, a row takes its share from the columns that are least used so far, ties broken at random.
    """
    block = as_block(block)
    rows, cols = unit_grid(shape, block)
    if not 0 <= num_units <= rows * cols:
        raise ValueError(f"cannot place {num_units} units in a {rows} x {cols} grid")
    share = torch.full((rows,), num_units // max(rows, 1), dtype=torch.int64)
    extra = torch.randperm(rows, generator=generator)[: num_units - int(share.sum())]
    share[extra] += 1
    used = torch.zeros(cols, dtype=torch.float64)
    chosen = []
    for row in torch.randperm(rows, generator=generator).tolist():
        noise = torch.rand(cols, generator=generator, dtype=torch.float64) * 0.5  # below the step between two counts
        taken = torch.sort(used + noise, stable=True).indices[: int(share[row])]
        used[taken] += 1
        chosen.append(row * cols + taken)
    units = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)
    return Pattern.from_units(units, shape, block)


def butterfly_pattern(shape: Sequence[int], num_units: int, block: Block = 1) -> Pattern:
    """Exactly `num_units` units of the flat block butterfly. Nothing is drawn.

    Square grids of n units a side, n a power of two: unit row i has columns i XOR d, for d in the order 0, then the
    strides 1, 2, 4, ... n/2. So (1 + s) * n units are the sum of the first s butterfly factors, each with its identity:
    the flat block butterfly of maximum stride 2**(s-1). What the budget asks for beyond all strides goes to products of
    two factors, then of three: d = 3, 5, 6, 9, ..., 7, 11, ....

    Every row takes its first columns in that order, the counts of two rows differing by at most one; rows that take one
    more are spread evenly. So the last stride may be there in part. Other grids are stretched: the longer side is
    folded evenly onto the shorter, and that onto the largest power of two that it holds, whose units become 1 or 2
    wide. In grids with more columns than rows it is the columns whose counts differ by at most one.

    With at least as many units as the longer side has, no row and no column is empty. Memory and time O(num_units).

    Raises:
        ValueError: more units than the grid has, or a block that does not divide the shape.
    Source:
        Dao et al. 2022 (arXiv:2112.00029), section 3: flat block butterfly, stretched to rectangles. Theirs takes whole
        strides and sizes that a power of two divides; the part of a stride, the products and other sizes are ours.
    """
    block = as_block(block)
    rows, cols = unit_grid(shape, block)
    if not 0 <= num_units <= rows * cols:
        raise ValueError(f"cannot place {num_units} units in a {rows} x {cols} grid")
    long, short = max(rows, cols), min(rows, cols)
    if not num_units:
        return Pattern.from_units(torch.empty(0, dtype=torch.int64), shape, block)
    lines = torch.arange(long)
    counts = (lines + 1) * num_units // long - lines * num_units // long
    folded = lines * short // long
    chosen = _butterfly_order(short, int(counts.max()))[folded]
    taken = torch.arange(chosen.shape[1]) < counts[:, None]
    along, across = lines[:, None].expand_as(chosen)[taken], chosen[taken]
    return Pattern.from_units(along * cols + across if rows >= cols else across * cols + along, shape, block)


def _butterfly_order(size: int, length: int) -> Tensor:
    """(size, length) int64: of each row of a square grid the first columns in the butterfly's order, its own first."""
    half = 1 << (size.bit_length() - 1)
    index = torch.arange(size)
    cell = index * half // size
    start = -(-torch.arange(half + 1) * size // half)  # of each cell; it is 1 or 2 wide
    distances = sorted(range(half), key=lambda d: (d.bit_count(), d))[:length]
    partner = cell[:, None] ^ torch.tensor(distances)
    width = torch.diff(start)[partner]
    # Inside a cell a row's columns begin at its own place, so that the first of them form a diagonal.
    place = (index - start[cell])[:, None, None] + torch.arange(2)
    columns = (start[partner][..., None] + place % width[..., None]).flatten(1)
    exists = (torch.arange(2) < width[..., None]).flatten(1)
    # A stable sort brings the columns that exist to the front of their row, in order.
    front = torch.sort((~exists).to(torch.uint8), dim=1, stable=True).indices[:, :length]
    return columns.gather(1, front)


def constant_fan_in(density: float, num_cols: int) -> int:
    """Units of every row: max(1, round(density * columns)) (rule 2.2)."""
    return min(max(1, round(density * num_cols)), num_cols)


def constant_fan_in_pattern(
    shape: Sequence[int], num_units: int, block: Block = 1, *, generator: torch.Generator | None = None
) -> Pattern:
    """Every row has the same number of units, at columns of its own, uniform without replacement (rule 2.2).

    Raises:
        ValueError: `num_units` is not a multiple of the rows, or too many.
    """
    block = as_block(block)
    rows, cols = unit_grid(shape, block)
    if num_units % max(rows, 1) or not 0 <= num_units <= rows * cols:
        raise ValueError(
            f"rows of equal fan-in hold a multiple of {rows} units, at most {rows * cols}, got {num_units}: "
            "rows * max(1, round(density * columns)) of them"
        )
    fan_in, step = num_units // max(rows, 1), max(1, _DRAWN_ENTRIES // max(cols, 1))
    chosen = [torch.empty(0, dtype=torch.int64)]
    for first in range(0, rows, step):
        count = min(step, rows - first)
        noise = torch.rand(count, cols, generator=generator, dtype=torch.float64)
        columns = torch.sort(noise.topk(fan_in, dim=1).indices, dim=1).values
        chosen.append((columns + torch.arange(first, first + count)[:, None] * cols).flatten())
    return Pattern.from_sorted_units(torch.cat(chosen), shape, block)


@functools.cache
def _two_four_tiles() -> Tensor:
    """(90, 8) int64: the columns, row by row, of every 4x4 tile with two units in each row and column."""
    rows = list(itertools.combinations(range(4), 2))
    tiles = (tile for tile in itertools.product(rows, repeat=4) if all(sum(tile, ()).count(c) == 2 for c in range(4)))
    return torch.tensor([sum(tile, ()) for tile in tiles])


def two_four_pattern(
    shape: Sequence[int], num_units: int, block: Block = 1, *, generator: torch.Generator | None = None
) -> Pattern:
    """Two units in every aligned four of a row, and of a column: each 4x4 tile is one of the 90 such, at random.

    So GPUs' sparse tensor cores take the matrix forward and turned (Hubara et al. 2021, arXiv:2102.08124, section 4:
    transposable masks).

    Raises:
        ValueError: blocks, a number of units that is not half of the entries, or a side that 4 does not divide.
    """
    rows, cols = unit_grid(shape, as_block(block))
    if as_block(block) != (1, 1) or rows % 4 or cols % 4 or 2 * num_units != rows * cols:
        raise ValueError(
            f"two in four are single units, half of a matrix whose sides 4 divides: got {num_units} of "
            f"{rows} x {cols} units of {block}"
        )
    tiles = _two_four_tiles()
    drawn = torch.randint(len(tiles), (rows // 4, cols // 4), generator=generator)
    columns = tiles[drawn].view(rows // 4, cols // 4, 4, 2) + 4 * torch.arange(cols // 4)[:, None, None]
    columns = columns.transpose(1, 2).reshape(rows, cols // 2)
    return Pattern.from_sorted_units((columns + cols * torch.arange(rows)[:, None]).flatten(), shape, block)


def magnitude_pattern(weight: Tensor, num_units: int, block: Block = 1) -> Pattern:
    """The `num_units` units of a dense (O, I) weight with the largest mean magnitude; ties: lower unit first."""
    block = as_block(block)
    rows, cols = unit_grid(weight.shape, block)
    score = weight.detach().abs().reshape(rows, block[0], cols, block[1]).mean(dim=(1, 3)).flatten()
    units = torch.sort(score, descending=True, stable=True).indices[:num_units]
    return Pattern.from_units(units.cpu(), weight.shape, block)


def grouped_pattern(
    draw: Callable[[tuple[int, int], int, int], Pattern],
    shape: Sequence[int],
    num_units: int,
    block: Block,
    groups: int,
) -> Pattern:
    """A pattern whose `groups` equal groups of rows have equally many units, or one more: the earlier groups.

    Args:
        draw: the first pattern of a part: its shape, its units, and which group it is.
    """
    block = as_block(block)
    rows, cols = unit_grid(shape, block)
    if groups < 1 or rows % groups:
        raise ValueError(f"{groups} equal groups cannot share {rows} rows of units: give a number that divides {rows}")
    if groups == 1:
        return draw((int(shape[0]), int(shape[1])), num_units, 0)
    mine = rows // groups
    units = []
    for at in range(groups):
        part = draw((mine * block[0], int(shape[1])), num_units // groups + (at < num_units % groups), at)
        units.append(part.unit_indices().cpu() + at * mine * cols)
    return Pattern.from_sorted_units(torch.cat(units), shape, block)


def linear_values(
    pattern: Pattern, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Fresh values for a linear layer, by each row's actual fan-in: U(-1/sqrt(f), 1/sqrt(f)), f = inputs of that row.

    nn.Linear draws from the same law with f = in_features, so every neuron's output variance is what the dense layer
    had (Evci et al. 2022, arXiv:2010.03533, section 3.1).
    """
    fan_in = (torch.diff(pattern.crow_indices) * pattern.block[1]).clamp(min=1).to(torch.float32)
    bound = fan_in.rsqrt().repeat_interleave(torch.diff(pattern.crow_indices).long())
    drawn = torch.rand(values_shape(pattern), generator=generator, dtype=torch.float32) * 2 - 1
    return (drawn * bound.view(-1, *[1] * (drawn.dim() - 1))).to(dtype or torch.get_default_dtype())


def row_rescale(pattern: Pattern) -> Tensor:
    """(K,) float32 factor 1 / sqrt(row density) of each unit: kept values of a dense init scaled by it keep each
    neuron's output variance (rule 3.2; Evci et al. 2022).
    """
    counts = torch.diff(pattern.crow_indices).float()
    factor = (pattern.num_unit_cols / counts.clamp(min=1)).sqrt()
    return factor.repeat_interleave(counts.long())


def bias_bound(in_features: int) -> float:
    """nn.Linear's bound for a fresh bias: the dense fan-in's, as a bias sees no pattern."""
    return 1 / math.sqrt(in_features) if in_features > 0 else 0.0


def values_shape(pattern: Pattern) -> tuple[int, ...]:
    """Shape of the values of a pattern: (nnz,) for single entries, else (K, b_r, b_c)."""
    return (pattern.num_units,) if pattern.block == (1, 1) else (pattern.num_units, *pattern.block)
