"""Schedules see progress in [0, 1] and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy import Constant, Cosine, Linear, Schedule

FRACTIONS = st.floats(0, 1)


@pytest.mark.parametrize(
    "schedule, at",
    [
        (Constant(0.3), {0.0: 0.3, 0.5: 0.3, 1.0: 0.3}),
        (Linear(0.4), {0.0: 0.4, 0.25: 0.3, 0.5: 0.2, 1.0: 0.0}),
        (Linear(0.1, 0.5), {0.0: 0.1, 0.5: 0.3, 1.0: 0.5}),
        (Cosine(0.3), {0.0: 0.3, 1 / 3: 0.225, 0.5: 0.15, 2 / 3: 0.075, 1.0: 0.0}),
        (Cosine(start=0.5, stop=0.1), {0.0: 0.5, 0.5: 0.3, 1.0: 0.1}),
    ],
)
def test_values_by_hand(schedule, at):
    assert {p: schedule(p) for p in at} == pytest.approx(at, abs=1e-15)


@given(FRACTIONS, FRACTIONS, st.floats(-10, 10))
def test_stays_between_its_ends(start, stop, progress):
    """So that a method's fraction never leaves [0, 1], not even by rounding."""
    for schedule in (Constant(start), Linear(start, stop), Cosine(start, stop)):
        low, high = (start, start) if isinstance(schedule, Constant) else sorted((start, stop))
        assert low <= schedule(progress) <= high or math.isclose(schedule(progress), low, abs_tol=1e-16)
        assert 0 <= schedule(progress) <= 1


@pytest.mark.parametrize("schedule", [Linear(0.3, 0.1), Cosine(0.3, 0.1)])
def test_progress_is_clipped(schedule):
    assert schedule(-0.5) == schedule(0.0) == 0.3
    assert schedule(1.5) == schedule(1.0) == pytest.approx(0.1)


def test_a_schedule_of_ones_own_defines_at():
    class Square(Schedule):
        def at(self, progress: float) -> float:
            return progress**2

    assert Square()(0.5) == 0.25 and Square()(2.0) == 1.0
    with pytest.raises(NotImplementedError, match="Schedule must define at"):
        Schedule()(0.5)
