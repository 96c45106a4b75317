"""tools/fit_time.py: loss against time out of the records of races."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

import fit_time
from fit_time import Curves, Point, best_points, fit, resampled, spread_over_seeds
from rarefy.foresight.records import NETWORK

TRUE = Curves(1.2, {"dense": (0.40, 0.30), "sparse": (0.39, 0.33)})


def points(*minutes: float) -> list[Point]:
    return [Point(side, 60 * m, TRUE.bits(side, 60 * m)) for side in TRUE.sides for m in minutes]


def record(label: str, seconds: float, final: float, *, dense: bool, **settings: Any) -> dict[str, Any]:
    settings = {**NETWORK, "layers": 4, **settings}
    common = {"task": "text", "state": "finished", "settings": settings}
    return {**common, "label": label, "dense": dense, "final": final, "clock": {"train_s": seconds}}


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
    assert spread_over_seeds(records, [10, 30]) == pytest.approx(0.03 / 2**0.5)


def test_with_a_known_floor_two_budgets_are_enough():
    found = fit(points(3, 10), floor=TRUE.floor)
    for side in TRUE.sides:
        assert found.bits(side, 5400) == pytest.approx(TRUE.bits(side, 5400), abs=1e-6)
    with pytest.raises(ValueError, match=r"a floor of 2\.000 is not below the best run"):
        fit(points(3, 10), floor=2.0)
    ends = [[one.bits("dense", 5400) for one in resampled(points(3, 10), 0.003, 50, floor=(1.2, s))] for s in (0, 0.1)]
    assert max(ends[1]) - min(ends[1]) > max(ends[0]) - min(ends[0]) > 0, "a floor that is not sure moves what follows"


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="five points"):
        fit(points(3, 10))
    with pytest.raises(ValueError, match="sparse has fewer"):
        fit([point for point in points(3, 10, 30) if point.side == "dense"])


def said(tmp_path, monkeypatch, records: list[dict[str, Any]], *more: str) -> None:
    for at, one in enumerate(records):
        (tmp_path / f"{at}.json").write_text(json.dumps(one))
    monkeypatch.setattr(sys, "argv", ["fit_time.py", str(tmp_path), "--layers", "4", *more])
    fit_time.main()


def test_what_races_predict_is_printed(tmp_path, monkeypatch, capsys):
    """A budget that is held out is predicted; runs of other networks than today's, or of other depths, do not count."""
    records = [
        record(side, 60 * m, TRUE.bits(side, 60 * m) + noise, dense=side == "dense")
        for side in TRUE.sides for m in (3, 10, 30, 90) for noise in (-0.002, 0.002)
    ]  # fmt: skip
    records += [record("other", 600, 1.0, dense=True, **other) for other in ({"positions": "learned"}, {"layers": 2})]
    said(tmp_path, monkeypatch, records, "--hold-out", "90")

    printed = capsys.readouterr().out
    assert "other" not in printed and printed.count("(2 seeds)") == 6 and "spread of a run 0.0028" in printed
    assert f"held out: dense {TRUE.bits('dense', 5400):.4f}, predicted {TRUE.bits('dense', 5400):.3f}"[:-1] in printed
    assert "a day on 64 cores at 0.5 of 32 times the speed: dense" in printed


@pytest.mark.parametrize("seeds, wanted", [(1, "no network has two seeds"), (2, "five points, got 4")])
def test_too_few_races_are_an_error_without_a_traceback(tmp_path, monkeypatch, capsys, seeds, wanted):
    records = [record(s, 60 * m, 2.0, dense=s == "dense") for s in TRUE.sides for m in (3, 10) for _ in range(seeds)]
    with pytest.raises(SystemExit):
        said(tmp_path, monkeypatch, records)
    assert wanted in capsys.readouterr().err
