"""Equal groups of a matrix's unit rows, one after the other: an attention head's rows of a projection, for example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rarefy.pattern import Pattern


@dataclass(frozen=True)
class Group:
    """Consecutive unit rows of a layer."""

    rows: slice
    """In entries, of the matrix."""
    units: slice
    """Their units, by row-major index."""
    positions: slice
    """Those that are active, by position in the pattern."""
    pattern: Pattern
    """Of these rows alone."""


def groups_of(pattern: Pattern, groups: int) -> Iterator[Group]:
    """The pattern in `groups` equal groups of rows, which must divide them."""
    rows, cols, b_r = pattern.num_unit_rows // groups, pattern.num_unit_cols, pattern.block[0]
    shape = (rows * b_r, pattern.shape[1])
    starts = pattern.crow_indices[::rows].tolist() if rows else [0] * (groups + 1)
    for at in range(groups):
        begin, end = starts[at], starts[at + 1]
        crow = pattern.crow_indices[at * rows : (at + 1) * rows + 1] - begin
        yield Group(
            slice(at * rows * b_r, (at + 1) * rows * b_r),
            slice(at * rows * cols, (at + 1) * rows * cols),
            slice(begin, end),
            Pattern(crow, pattern.col_indices[begin:end], shape, pattern.block),
        )


def split(k: int, active: list[int], every: list[int]) -> list[int]:
    """k over the groups: in proportion to their active units, by largest remainder (ties: the earlier group), and no
    more than a group has absent ones.

    Args:
        active, every: K and n of each group.
    """
    total = sum(active)
    parts = [k * mine // total if total else 0 for mine in active]
    order = sorted(range(len(active)), key=lambda at: -(k * active[at] % total if total else 0))
    for at in order[: k - sum(parts) if total else 0]:
        parts[at] += 1
    return [min(part, n - mine) for part, mine, n in zip(parts, active, every, strict=True)]


def split_over(k: int, groups: Sequence[Group]) -> list[int]:
    """`split`, of these."""
    sizes = [group.units.stop - group.units.start for group in groups]
    return split(k, [group.pattern.num_units for group in groups], sizes)
