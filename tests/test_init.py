"""First patterns and first values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rarefy import Pattern, SparseLinear
from rarefy.init import balanced_pattern, linear_values, magnitude_pattern, row_rescale, values_shape


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([(1, 1), (4, 1), (2, 3)]), st.data())
def test_balanced_rows_and_columns_differ_by_at_most_one(rows, cols, block, data):
    k = data.draw(st.integers(0, rows * cols))
    shape = (rows * block[0], cols * block[1])
    pattern = balanced_pattern(shape, k, block, generator=torch.Generator().manual_seed(k))
    assert pattern.num_units == k and pattern.shape == shape
    by_row = torch.diff(pattern.crow_indices)
    by_col = torch.bincount(pattern.col_indices.long(), minlength=cols)
    assert int(by_row.max() - by_row.min()) <= 1
    assert int(by_col.max() - by_col.min()) <= 1


def test_balanced_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="cannot place 13 units in a 3 x 4 grid"):
        balanced_pattern((3, 4), 13)


def test_balanced_patterns_are_drawn():
    drawn = {balanced_pattern((8, 8), 16, generator=torch.Generator().manual_seed(seed)) for seed in range(5)}
    assert len(drawn) == 5


def test_magnitude_keeps_the_largest_and_the_lower_of_equals():
    weight = torch.tensor([[1.0, -3.0, 2.0], [-2.0, 0.5, 2.0]])
    assert magnitude_pattern(weight, 1).unit_indices().tolist() == [1]
    assert magnitude_pattern(weight, 2).unit_indices().tolist() == [1, 2]
    assert magnitude_pattern(weight, 3).unit_indices().tolist() == [1, 2, 3]
    assert magnitude_pattern(weight, 6).unit_indices().tolist() == list(range(6))


def test_magnitude_of_a_block_is_its_mean():
    weight = torch.tensor([[9.0, 0.0, 3.0, 3.0], [0.0, 0.0, 3.0, 3.0]])
    assert magnitude_pattern(weight, 1, 2).unit_indices().tolist() == [1]


@pytest.mark.parametrize("block", [(1, 1), (4, 4)], ids=str)
def test_values_are_uniform_by_each_rows_fan_in(block):
    """U(-1/sqrt(f), 1/sqrt(f)) has variance 1/(3f): a neuron's output variance is the same at any fan-in."""
    rows, cols = 3 * block[0], 4000 * block[1]
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for unit_row, kept in enumerate((4000, 1000, 2000)):
        mask[unit_row * block[0] : (unit_row + 1) * block[0], : kept * block[1]] = True
    pattern = Pattern.from_mask(mask, block)
    values = linear_values(pattern, generator=torch.Generator().manual_seed(0))
    assert values.shape == values_shape(pattern)
    for unit_row, kept in enumerate((4000, 1000, 2000)):
        mine = values[pattern.row_indices() == unit_row]
        bound = 1 / math.sqrt(kept * block[1])
        assert 0.99 * bound < float(mine.abs().max()) <= bound
        assert float(mine.var()) == pytest.approx(bound**2 / 3, rel=0.1)


def test_a_full_layer_starts_as_a_dense_one_does():
    sparse, dense = SparseLinear(50, 40, density=1.0), nn.Linear(50, 40)
    bound = 1 / math.sqrt(50)
    for found, wanted in ((sparse.values, dense.weight), (sparse.bias, dense.bias)):
        assert found is not None
        assert float(found.detach().abs().max()) <= bound
        assert float(found.detach().std()) == pytest.approx(float(wanted.detach().std()), rel=0.25)


def test_rescale_is_one_over_the_root_of_row_density():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    factor = row_rescale(Pattern.from_mask(mask))
    torch.testing.assert_close(factor, torch.tensor([1.0, 1, 1, 1, 2, math.sqrt(2), math.sqrt(2)]))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_output_variance_is_the_dense_layers(density):
    """Over many neurons and inputs, the mean square of the outputs of both is 1/3 without bias."""
    x = torch.randn(200, 1000)
    layer = SparseLinear(1000, 500, bias=False, density=density)
    assert float(layer(x).detach().pow(2).mean()) == pytest.approx(1 / 3, rel=0.05)
