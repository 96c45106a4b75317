"""Drawing: the right number, without replacement, uniform, repeatable from a key and from nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.sampling import first_appearances, keyed_generator, repair_empty_rows, sample_without_replacement
from rarefy.selection import random_absent


@given(st.integers(0, 200), st.data(), st.booleans())
def test_draws_exactly_k_distinct_in_order(n, data, numpy_generator):
    k = data.draw(st.integers(0, n))
    generator = np.random.default_rng(0) if numpy_generator else torch.Generator().manual_seed(0)
    drawn = sample_without_replacement(n, k, generator).tolist()
    assert len(drawn) == k and drawn == sorted(set(drawn)) and all(0 <= unit < n for unit in drawn)


@pytest.mark.parametrize("n, k", [(3, 4), (0, 1), (5, -1)])
def test_cannot_draw_more_than_there_are(n, k):
    with pytest.raises(ValueError, match=f"cannot draw {k} of {n} units"):
        sample_without_replacement(n, k)


def chi_square(counts: Counter, outcomes: int) -> float:
    draws = sum(counts.values())
    expected = draws / outcomes
    seen = sum((count - expected) ** 2 / expected for count in counts.values())
    return seen + (outcomes - len(counts)) * expected


@pytest.mark.parametrize("n, k", [(5, 2), (5, 3), (6, 1), (6, 5)])
def test_every_set_is_equally_likely(n, k):
    """Chi-square over all sets: with 9 degrees of freedom or so, above 40 happens once in a hundred thousand seeds."""
    generator = torch.Generator().manual_seed(7)
    counts = Counter(tuple(sample_without_replacement(n, k, generator).tolist()) for _ in range(3000))
    sets = list(combinations(range(n), k))
    assert set(counts) <= set(sets)
    assert chi_square(counts, len(sets)) < 40


def test_random_absent_is_uniform_over_what_is_not_there():
    present = torch.tensor([0, 2, 3, 6])
    generator = np.random.default_rng(3)
    counts = Counter(tuple(random_absent(present, 8, 2, generator).tolist()) for _ in range(2000))
    assert set(counts) == set(combinations([1, 4, 5, 7], 2))
    assert chi_square(counts, 6) < 40


@given(st.sets(st.integers(0, 40)), st.data())
def test_random_absent_draws_absent_units_only(present, data):
    k = data.draw(st.integers(0, 41 - len(present)))
    ordered = torch.tensor(sorted(present), dtype=torch.int64)
    drawn = random_absent(ordered, 41, k, keyed_generator(1, 2, "layer")).tolist()
    assert len(drawn) == k and drawn == sorted(set(drawn))
    assert not set(drawn) & present and set(drawn) <= set(range(41))


@given(st.lists(st.integers(0, 5), max_size=30))
def test_first_appearances_keeps_order(drawn):
    values, first = first_appearances(torch.tensor(drawn, dtype=torch.int64))

    assert values.tolist() == sorted(set(drawn))
    assert (
        values[first.argsort()].tolist() == list(dict.fromkeys(drawn))
        and [drawn[at] for at in first] == values.tolist()
    )


DRAW = (
    "from rarefy.sampling import keyed_generator; print(keyed_generator(3, 17, 'a.b').integers(2**62, size=4).tolist())"
)


def test_a_key_means_the_same_in_every_process():
    """Not so with Python's hash(), which is salted anew in each."""
    here = str(keyed_generator(3, 17, "a.b").integers(2**62, size=4).tolist())
    for salt in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        found = subprocess.run(
            [sys.executable, "-c", DRAW], capture_output=True, text=True, env=environment, check=True, timeout=120
        )
        assert found.stdout.strip() == here


def test_keys_differ_in_every_part_and_leave_global_state_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    keys = [(0, 1, "a"), (1, 0, "a"), (0, 1, "b"), (0, 11, "a"), (0, 1, "a", 0), (0, "1a")]
    assert len({tuple(keyed_generator(*key).integers(2**62, size=2)) for key in keys}) == len(keys)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_repair_moves_as_few_as_needed(rows, cols, data):
    """As many units as before, no row empty if there are enough, and only the fullest rows gave."""
    k = data.draw(st.integers(0, rows * cols))
    units = torch.tensor(sorted(data.draw(st.permutations(range(rows * cols)))[:k]), dtype=torch.int64)
    repaired = repair_empty_rows(units, rows, cols, torch.Generator().manual_seed(0))
    assert repaired.tolist() == sorted(set(repaired.tolist())) and repaired.numel() == k
    before, after = (torch.bincount(u // cols, minlength=rows) for u in (units, repaired))
    if k < rows:
        assert torch.equal(repaired, units)
        return
    assert int(after.min()) >= 1
    assert torch.equal(after[before == 0], torch.ones_like(after[before == 0]))
    gave = before > after
    assert int((before - after)[gave].sum()) == int((before == 0).sum())
    if gave.any():  # taking from the fullest of the moment leaves no other row above the givers' new height + 1
        assert int(after[before > 0].max()) <= int(after[gave].min()) + 1
    kept = set(units.tolist()) & set(repaired.tolist())
    assert len(kept) == k - int((before == 0).sum())
