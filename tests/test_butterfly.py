"""The flat block butterfly: which units it has, how many, and what it never leaves empty."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy import Pattern, Plan, Static, sparsify
from rarefy.init import butterfly_pattern


def factor(size: int, stride: int) -> torch.Tensor:
    """Where a butterfly factor may be nonzero: blocks of 2 * stride, in each of them four diagonals."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    for begin in range(0, size, 2 * stride):
        for i in range(stride):
            for row, col in itertools.product((begin + i, begin + stride + i), repeat=2):
                mask[row, col] = True
    return mask


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("block", [1, 2])
def test_equals_the_sum_of_butterfly_factors(size, block):
    strides = [2**s for s in range(size.bit_length() - 1)]
    for used in range(1, len(strides) + 1):
        mask = torch.stack([factor(size, stride) for stride in strides[:used]]).any(0)
        mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        pattern = butterfly_pattern((size * block, size * block), (1 + used) * size, block)
        assert pattern == Pattern.from_mask(mask, block)


@pytest.mark.parametrize("rows, cols", [(32, 8), (8, 32)])
def test_a_rectangle_is_the_square_stretched(rows, cols):
    square = torch.stack([torch.eye(8, dtype=torch.bool), *(factor(8, stride) for stride in (1, 2))]).any(0)
    mask = square.repeat_interleave(rows // 8, 0).repeat_interleave(cols // 8, 1)
    assert butterfly_pattern((rows, cols), int(mask.sum())) == Pattern.from_mask(mask)


def test_part_of_a_stride_is_spread_evenly_over_rows():
    pattern = butterfly_pattern((8, 8), 8 + 4)
    assert torch.diff(pattern.crow_indices).tolist() == [1, 2, 1, 2, 1, 2, 1, 2]
    extra = [unit for unit in pattern.unit_indices().tolist() if unit // 8 != unit % 8]
    assert [(unit // 8, unit % 8) for unit in extra] == [(1, 0), (3, 2), (5, 4), (7, 6)]


def test_beyond_all_strides_come_products_of_two_factors():
    pattern = butterfly_pattern((8, 8), 5 * 8)
    distances = {(unit // 8) ^ (unit % 8) for unit in pattern.unit_indices().tolist()}
    assert distances == {0, 1, 2, 4, 3}


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, tuple[int, int], int]:
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    block = draw(st.sampled_from([(1, 1), (4, 4), (4, 1), (2, 3)]))
    return rows, cols, block, draw(st.integers(0, rows * cols))


@given(grids())
def test_exact_count_balanced_and_nothing_left_empty(grid):
    rows, cols, block, units = grid
    pattern = butterfly_pattern((rows * block[0], cols * block[1]), units, block)
    by_row, by_col = torch.diff(pattern.crow_indices), torch.diff(pattern.transposed()[0])
    assert pattern.num_units == units
    longer = by_row if rows >= cols else by_col
    assert int(longer.max() - longer.min()) <= 1
    if units >= max(rows, cols):
        assert int(by_row.min()) > 0
        assert int(by_col.min()) > 0


@given(st.integers(0, 6), st.integers(0, 2), st.data())
def test_powers_of_two_are_balanced_on_both_sides(log_size, log_stretch, data):
    """Whole strides exactly; a stride in part to one unit a row, and as many rows as a column has, a column."""
    rows, cols = 2 ** (log_size + log_stretch), 2**log_size
    strides = data.draw(st.integers(1, cols))
    pattern = butterfly_pattern((rows, cols), strides * rows)
    assert set(torch.diff(pattern.crow_indices).tolist()) == {strides}
    assert set(torch.diff(pattern.transposed()[0]).tolist()) == {strides * rows // cols}


def test_refuses_more_units_than_there_are():
    with pytest.raises(ValueError, match="cannot place 65 units in a 8 x 8 grid"):
        butterfly_pattern((8, 8), 65)


def test_a_plan_has_it_in_every_layer_and_on_the_meta_device():
    def network() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 24))

    plan = Plan(density=0.3, init="butterfly", block=4, method=Static())
    rewirer = sparsify(network(), plan)
    for layer in rewirer.layers.values():
        assert layer.pattern == butterfly_pattern((layer.out_features, layer.in_features), layer.num_units, 4)
    with torch.device("meta"):
        empty = network()
    later = sparsify(empty, plan)
    empty.to_empty(device="cpu")
    for layer, same in zip(later.layers.values(), rewirer.layers.values(), strict=True):
        layer.reset_parameters()
        assert layer.pattern == same.pattern
