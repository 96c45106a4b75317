"""First patterns and first values (rewiring rules 3.1 and 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.pattern import Block, Pattern, as_block, unit_grid

PatternInit = Literal["random", "balanced", "magnitude"]


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
