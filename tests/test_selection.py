"""Selections and searches over many units against plain sorts: some ways are taken only where there are many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rarefy import selection
from rarefy.methods.redistribution import split_lowest
from rarefy.selection import all_finite, contains, highest, kth_lowest, lowest, num_below, num_true, positions

MANY = 70_000  # above what is selected without a sample


def scores(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(MANY, generator=generator)
    return {
        "drawn": drawn.abs(),
        "signed": drawn,
        "ties": (drawn * 3).round(),
        "nearly all zero": torch.where(drawn > 2.5, drawn, 0.0),
        "ascending": drawn.sort().values,
        # Every score that a sample of equal strides sees is high, so that its bounds are wrong.
        "misleading": torch.where(torch.arange(MANY) % (MANY // 4096) == 0, drawn + 100, drawn),
        "infinite": torch.where(drawn > 2, torch.inf, torch.where(drawn < -2, -torch.inf, drawn)),
        "double": drawn.double(),
        "bfloat16": drawn.bfloat16(),
    }[kind]


KINDS = ("drawn", "signed", "ties", "nearly all zero", "ascending", "misleading", "infinite", "double", "bfloat16")


@pytest.mark.parametrize("k", [1, 2, 1000, MANY // 3, MANY - 1, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_rule_5_2_the_lowest_of_many_are_those_of_a_stable_sort(kind, k):
    score = scores(kind)
    ordered = torch.sort(score, stable=True)

    assert kth_lowest(score, k) == ordered.values[k - 1]
    assert torch.equal(lowest(score, k), ordered.indices[:k].sort().values)


@pytest.mark.parametrize("k", [0, 1, 5000, MANY // 2, MANY, MANY + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_rule_6_2_the_highest_of_many_are_those_of_a_stable_sort(kind, k):
    score = scores(kind)
    units = torch.randperm(MANY, generator=torch.Generator().manual_seed(1)) * 3

    by_unit, order = units.sort()
    wanted = by_unit[torch.sort(-score[order], stable=True).indices[:k]].sort().values

    assert torch.equal(highest(score, units, k), wanted)


@pytest.mark.parametrize("k", [0, 1, 30_000, 2 * MANY])
def test_layers_share_the_lowest_in_their_order(k):
    parts = [scores("ties"), scores("ties").flip(0)]
    layers = torch.tensor([0, 1]).repeat_interleave(MANY)
    gone = layers[torch.sort(torch.cat(parts), stable=True).indices[:k]]

    assert split_lowest(parts, k) == torch.bincount(gone, minlength=2).tolist()


@pytest.mark.parametrize("size", [selection.SLICE, 7_000])
@pytest.mark.parametrize("span", [1, 3, 1000])
@pytest.mark.parametrize("many", [10, 20_000])
def test_searches_are_the_same_by_tables(span, many, size, monkeypatch):
    """Dense sets of many units are looked up in tables, the others by binary search."""
    monkeypatch.setattr(selection, "SLICE", size)
    generator = torch.Generator().manual_seed(0)
    ascending = torch.randperm(many * span, generator=generator)[:many].sort().values
    wanted = torch.randint(many * span + 100, (many,), generator=generator).sort().values

    assert torch.equal(num_below(ascending, wanted), torch.searchsorted(ascending, wanted))
    assert torch.equal(contains(ascending, wanted), torch.isin(wanted, ascending))
    assert torch.equal(contains(ascending, wanted.flip(0)), torch.isin(wanted.flip(0), ascending))
    assert not contains(ascending[:0], wanted).any() and contains(ascending, wanted[:0]).numel() == 0
    assert not num_below(ascending[:0], wanted).any()


def test_positions_and_counts():
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.3

    assert torch.equal(positions(mask), mask.nonzero().flatten()) and num_true(mask) == int(mask.sum())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rule_8_3_one_value_that_is_not_finite_is_found(bad):
    values = torch.full((1000,), torch.finfo(torch.float32).max)
    values[::2] *= -1
    assert all_finite(values) and all_finite(values[:0])

    values[567] = bad

    assert not all_finite(values)
    assert np.isfinite(values.numpy()).sum() == 999
