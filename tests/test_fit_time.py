"""tools/fit_time.py: loss against time out of the records of races."""

from __future__ import annotations

import pytest

from fit_time import Curves, Point, best_points, fit, resampled, spread_over_seeds

TRUE = Curves(1.2, {"dense": (0.40, 0.30), "sparse": (0.39, 0.33)})


def points(*minutes: float) -> list[Point]:
    return [Point(side, 60 * m, TRUE.bits(side, 60 * m)) for side in TRUE.sides for m in minutes]


def record(label: str, seconds: float, final: float, *, dense: bool) -> dict:
    return {"label": label, "dense": dense, "final": final, "clock": {"train_s": seconds}}


def test_the_constants_are_found_again():
    found = fit(points(3, 10, 30, 90))

    assert found.floor == pytest.approx(TRUE.floor, abs=0.01)
    for side, constants in TRUE.sides.items():
        assert found.sides[side] == pytest.approx(constants, rel=0.05)
    for side in TRUE.sides:  # what was not seen is predicted
        assert found.bits(side, 86_400) == pytest.approx(TRUE.bits(side, 86_400), abs=0.01)


def test_the_share_of_time_is_where_both_are_as_good():
    share = TRUE.share(3600)

    assert share < 1
    assert TRUE.bits("sparse", share * 3600) == pytest.approx(TRUE.bits("dense", 3600))


def test_noise_moves_what_lies_farther_out_more():
    found = resampled(points(3, 10, 30), spread=0.003, draws=20)

    def width(seconds: float) -> float:
        ends = [curves.bits("dense", seconds) for curves in found]
        return max(ends) - min(ends)

    assert 0 < width(600) < width(86_400)


def test_the_best_network_of_a_budget_counts_by_the_mean_of_its_seeds():
    records = [
        record("narrow", 600, 1.62, dense=True),
        record("wide", 590, 1.60, dense=True),
        record("wide", 610, 1.63, dense=True),
        record("sparse", 620, 1.61, dense=False),
        record("sparse", 1800, 1.50, dense=False),
        record("sparse", 60, 2.50, dense=False),
    ]

    assert best_points(records, [10]) == [
        Point("dense", 600, pytest.approx(1.615), 2, "wide"),  # type: ignore[arg-type]
        Point("sparse", 620, 1.61, 1, "sparse"),
    ]
    assert spread_over_seeds(records) == pytest.approx(0.03 / 2**0.5)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="five points"):
        fit(points(3, 10))
    with pytest.raises(ValueError, match="sparse has fewer"):
        fit([point for point in points(3, 10, 30) if point.side == "dense"])
