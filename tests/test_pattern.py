"""Pattern: what it refuses, what it says of itself, and that it never changes."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import CASES
from rarefy import Pattern

BLOCKS = [(1, 1), (4, 4), (4, 1), (2, 3)]


@st.composite
def masks(draw) -> tuple[torch.Tensor, tuple[int, int]]:
    """A dense boolean (O, I) whose units are wholly on or off, and its block."""
    block = draw(st.sampled_from(BLOCKS))
    rows, cols = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    on = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols)), dtype=torch.bool)
    grid = on.view(rows, cols)
    return grid.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1), block


@given(masks())
def test_mask_round_trip(drawn):
    mask, block = drawn
    pattern = Pattern.from_mask(mask, block)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == int(mask.sum()) == pattern.num_units * block[0] * block[1]
    assert pattern.density == (float(mask.float().mean()) if mask.numel() else 0.0) or pattern.density == pytest.approx(
        float(mask.float().mean())
    )
    assert (pattern.num_unit_rows * block[0], pattern.num_unit_cols * block[1]) == pattern.shape == tuple(mask.shape)


@given(masks())
def test_indices_are_those_of_the_mask(drawn):
    mask, block = drawn
    pattern = Pattern.from_mask(mask, block)
    grid = mask[:: block[0], :: block[1]]
    assert pattern.unit_indices().tolist() == grid.flatten().nonzero().flatten().tolist()
    assert pattern.row_indices().tolist() == grid.nonzero()[:, 0].tolist()
    assert pattern.col_indices.tolist() == grid.nonzero()[:, 1].tolist()
    assert torch.diff(pattern.crow_indices).tolist() == grid.sum(dim=1).tolist()
    t_crow, t_rows, t_perm = pattern.transposed()
    assert torch.diff(t_crow).tolist() == grid.sum(dim=0).tolist()
    assert t_rows.tolist() == grid.T.nonzero()[:, 1].tolist()
    assert torch.equal(pattern.col_indices[t_perm.long()], torch.sort(pattern.col_indices, stable=True).values)
    assert torch.equal(pattern.row_indices()[t_perm.long()].int(), t_rows)
    assert {array.dtype for array in (t_crow, t_rows, t_perm, pattern.crow_indices)} == {torch.int32}


def test_a_unit_is_active_where_any_entry_is():
    mask = torch.zeros(4, 4)
    mask[1, 3] = -0.5
    assert Pattern.from_mask(mask, 2).unit_indices().tolist() == [1]


@given(st.permutations(range(12)), st.integers(0, 12))
def test_from_units_takes_any_order(order, count):
    units = order[:count]
    pattern = Pattern.from_units(torch.tensor(units, dtype=torch.int64), (3, 4))
    assert pattern.unit_indices().tolist() == sorted(units)


@pytest.mark.parametrize(
    "crow, cols, message",
    [
        ([0, 1], [0], r"crow_indices must have 3 entries for 2 unit rows, got \(2,\)"),
        ([0, 1, 2, 2], [0, 1], "crow_indices must have 3 entries"),
        ([[0, 1, 2]], [0, 1], "crow_indices must have 3 entries"),
        ([0, 1, 2], [[0], [1]], "col_indices must be one-dimensional"),
        ([1, 1, 2], [0, 1], r"rise from 0 to the number of units \(2\), got 1 to 2"),
        ([0, 1, 3], [0, 1], "rise from 0 to the number of units"),
        ([0, 3, 2], [0, 1], "falling in between"),
        ([0, 1, 2], [0, 3], r"col_indices must lie in \[0, 3\), got 0 to 3"),
        ([0, 1, 2], [-1, 0], r"col_indices must lie in \[0, 3\), got -1 to 0"),
        ([0, 0, 2], [1, 1], "rise strictly inside a row; unit row 1 does not"),
        ([0, 2, 2], [2, 0], "rise strictly inside a row; unit row 0 does not"),
        ([0.0, 1, 2], [0, 1], "indices must be integers"),
        ([0, 1, 2], [0.0, 1], "indices must be integers"),
    ],
)
def test_refuses_what_is_no_pattern(crow, cols, message):
    with pytest.raises(ValueError, match=message):
        Pattern(torch.tensor(crow), torch.tensor(cols), (2, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Pattern.from_units(torch.tensor([1, 1]), (2, 3)), "rise strictly"),
        (lambda: Pattern.from_units(torch.tensor([6]), (2, 3)), r"unit indices must lie in \[0, 6\), got 6 to 6"),
        (lambda: Pattern.from_units(torch.tensor([-1, 2]), (2, 3)), "unit indices must lie in"),
        (lambda: Pattern.random((8, 6), 0.5, 4), "a block of 4x4 does not divide a 8x6 matrix"),
        (lambda: Pattern.random((8, 8), 0.5, (4, 3)), "a block of 4x3 does not divide a 8x8 matrix"),
        (lambda: Pattern.random((8, 8), 0.5, 0), "block must be a positive int or a pair"),
        (lambda: Pattern.random((8, 8), 0.5, (4,)), "block must be a positive int or a pair"),
        (lambda: Pattern.random((8, 8), 0.5, (2.0, 2)), "block must be a positive int or a pair"),  # type: ignore[arg-type]
        (lambda: Pattern.random((8, 8), 0.0), r"density must lie in \(0, 1\], got 0.0"),
        (lambda: Pattern.random((8, 8), 1.5), r"density must lie in \(0, 1\], got 1.5"),
        (lambda: Pattern.random((8, 8), float("nan")), r"density must lie in \(0, 1\], got nan"),
        (lambda: Pattern.random((8, 8, 3), 0.5), r"shape must be \(out_features, in_features\)"),
        (lambda: Pattern.random((-8, 8), 0.5), r"shape must be \(out_features, in_features\)"),
        (lambda: Pattern.with_units((2, 3), 7), "cannot draw 7 of 6 units"),
    ],
)
def test_refuses_with_the_value_and_the_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cannot_be_changed():
    pattern = Pattern.random((4, 4), 0.5)
    with pytest.raises(AttributeError, match="immutable"):
        pattern.shape = (2, 8)
    with pytest.raises(AttributeError):
        pattern.anything = 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_and_digests_are_equal(case):
    pattern = case.pattern()
    for twin in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern), pattern.to("cpu"), case.pattern()):
        assert twin == pattern and hash(twin) == hash(pattern) and twin.digest() == pattern.digest()


def test_digest_tells_every_part_apart():
    """And follows its definition, so that files of one machine check on another."""
    units = torch.tensor([0, 5])
    patterns = [
        Pattern.from_units(units, (4, 4)),
        Pattern.from_units(units, (2, 8)),
        Pattern.from_units(units, (4, 8), (1, 2)),
        Pattern.from_units(units, (8, 4), (2, 1)),
        Pattern.from_units(units + 1, (4, 4)),
        Pattern.from_units(units[:1], (4, 4)),
    ]
    assert len({p.digest() for p in patterns}) == len(set(patterns)) == len(patterns)
    assert all(a != b for a in patterns for b in patterns if a is not b)
    indices = b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 2, 2, 0, 1))
    assert patterns[0].digest() == hashlib.sha256(b"(4, 4) (1, 1)" + indices).hexdigest()


def test_is_equal_to_patterns_only():
    pattern = Pattern.random((4, 4), 0.5)
    assert pattern != "pattern" and pattern != pattern.to_mask().tolist()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_random_has_exactly_the_rounded_number(block, density):
    pattern = Pattern.random((20 * block[0], 30 * block[1]), density, block)
    assert pattern.num_units == max(1, round(density * 600))


def test_random_depends_on_its_generator_alone():
    state = torch.get_rng_state()
    draws = [Pattern.random((30, 30), 0.2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_says_what_it_is():
    text = repr(Pattern.random((8, 16), 0.25, 4))
    assert "shape=(8, 16)" in text and "block=(4, 4)" in text and "units=2" in text and "density=0.25" in text


def test_takes_any_integer_arrays():
    wide = Pattern(torch.tensor([0, 1, 2]), torch.tensor([2, 0]), (2, 3))
    narrow = Pattern(
        torch.tensor([0, 1, 2], dtype=torch.int16), torch.tensor([2, 0], dtype=torch.uint8).to(torch.uint16), (2, 3)
    )
    assert wide == narrow and narrow.col_indices.dtype == torch.int32
