"""The scaling law: its values, what a fit finds, and which records it is fitted to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fit_scaling
from rarefy.foresight import Law, Point, shipped_law
from rarefy.foresight.fitting import Run, fit, left_out, relative_errors
from rarefy.foresight.law import PAPER, density_factor
from rarefy.foresight.records import NETWORK, run_of, tuned

TRUE: dict[str, Any] = {"E": 0.6, "A": 120.0, "B": 90.0}


@pytest.mark.parametrize(
    "density, factor",
    [
        (1.0, 1.0),
        (0.5, 1.0067464 - 0.273 * 0.5559435),  # 0.5^-0.0097 and 0.5^0.847
        (0.1, 1.0225867 - 0.273 * 0.9146249),  # 0.1^-0.0097 and 0.9^0.847
    ],
)
def test_the_density_factor_by_hand(density, factor):
    assert density_factor(density) == pytest.approx(factor, rel=1e-6)


def test_the_law_by_hand():
    """A million nonzeros, ten million bytes: 1e6^-0.327 = 10^-1.962, 1e7^-0.327 = 10^-2.289."""
    law = Law(E=2.0, A=100.0, B=200.0, blocks={"4x4": 0.25})
    dense = 2.0 + 100 * 0.01091440 + 200 * 0.005140437
    assert law.loss(Point(1e6, 1e7)) == pytest.approx(dense, rel=1e-6)
    tenth = 1.0225867 - 0.273 * 0.9146249
    assert law.loss(Point(1e6, 1e7, 0.1)) == pytest.approx(dense - 1.091440 * (1 - tenth), rel=1e-6)
    assert law.loss(Point(1e6, 1e7, 0.1, (4, 4))) - law.loss(Point(1e6, 1e7, 0.1)) == pytest.approx(0.25)
    # With d = 0.5 one block has 4^0.5 = 2 times the loss that weights leave.
    deep = dataclasses.replace(law, exponents={**PAPER, "d": 0.5})
    assert deep.loss(Point(1e6, 1e7, layers=4)) == law.loss(Point(1e6, 1e7)) == law.loss(Point(1e6, 1e7, layers=1))
    assert deep.loss(Point(1e6, 1e7, layers=1)) == pytest.approx(dense + 1.091440, rel=1e-6)
    with pytest.raises(ValueError, match="no runs with blocks of 8x8"):
        law.loss(Point(1e6, 1e7, 0.1, (8, 8)))
    with pytest.raises(ValueError, match="density"):
        law.loss(Point(1e6, 1e7, 0.0))


def truth(exponents: dict[str, float], extra: float = 0.0) -> list[Run]:
    """Runs without noise, dense, at 25% and 10%, some in blocks of 4x4, of two and four layers."""
    law = Law(**TRUE, exponents=exponents, blocks={"4x4": extra})
    shapes = [(1.0, (1, 1)), (0.25, (1, 1)), (0.1, (1, 1)), (0.1, (4, 4))]
    sizes = itertools.product((2e5, 1e6, 4e6), (5e5, 2e6, 9e6), shapes, (2, 4))
    points = [Point(n, d, s, b, layers) for n, d, (s, b), layers in sizes]
    return [Run(p, law.loss(p), network=("set", p.nonzeros, p.density, p.layers)) for p in points]


@pytest.mark.parametrize(
    "exponents",
    [
        PAPER,
        {**PAPER, "b": 0.52},
        {**PAPER, "b": 0.41, "g": 2.2},
        {**PAPER, "a": 0.2, "b": 0.6, "g": 1.5},
        {**PAPER, "d": 0.3},
        {**PAPER, "b": 0.4, "d": 0.15},
    ],
    ids=str,
)
def test_a_fit_finds_the_constants_that_made_its_points(exponents):
    free = tuple(name for name in PAPER if exponents[name] != PAPER[name])
    runs = truth(exponents, extra=0.02)
    law = fit(runs, free=free)
    assert max(map(abs, relative_errors(law, runs))) < 1e-3
    for name, value in exponents.items():
        assert law.exponents[name] == pytest.approx(value, rel=0.02)
    for name, value in TRUE.items():
        assert getattr(law, name) == pytest.approx(value, rel=0.1)
    assert law.blocks["4x4"] == pytest.approx(0.02, abs=2e-3)
    assert law.covers["density"] == (0.1, 1.0) and law.covers["layers"] == (2, 4)
    assert law.covers["nonzeros"] == (2e5, 4e6)


def test_shapes_that_were_left_out_are_predicted():
    assert max(map(abs, left_out(truth({**PAPER, "b": 0.52}), ("b",)))) < 1e-2
    lone = [run for run in truth(PAPER) if run.point.block == (1, 1) or run.network[1:] == (2e5, 0.1, 2)]
    errors = left_out(lone, ())
    assert len(errors) == sum(run.point.block == (1, 1) for run in lone), "a block without other runs is not predicted"
    assert max(map(abs, errors)) < 1e-2


def test_constants_are_never_negative():
    runs = [dataclasses.replace(run, loss=0.2 + run.point.nonzeros * 1e-7) for run in truth(PAPER)]  # larger is worse
    law = fit(runs)
    assert min(law.E, law.A, law.B, *law.blocks.values()) >= 0 and law.A == 0


def test_uncertainty_covers_new_runs_and_grows_with_the_distance():
    rng = np.random.default_rng(0)
    noisy = [dataclasses.replace(run, loss=run.loss * rng.normal(1, 0.02)) for run in truth(PAPER)]
    law = fit(noisy)
    assert law.spread == pytest.approx(0.02, rel=0.4)
    near, far = Point(1e6, 2e6, 0.25), Point(1e9, 1e11, 0.25)
    assert law.sigma(far) / law.loss(far) > 1.5 * law.sigma(near) / law.loss(near)
    misses = [abs(law.loss(run.point) - run.loss) / law.sigma(run.point) for run in truth(PAPER)]
    assert max(misses) < 2
    twin = Point(1e9, 1e11, 0.25)
    assert law.sigma_between(far, twin) == pytest.approx(math.sqrt(2) * law.spread * law.loss(far))
    assert law.outside(nonzeros=1e9, tokens=2e6, density=0.25) == ["nonzeros"]


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="need more runs"):
        fit(truth(PAPER)[:3])


def test_a_law_as_data():
    law = fit(truth(PAPER, extra=0.01), free=("b",), provenance={"runs": 36})
    assert Law.from_json(json.loads(json.dumps(law.to_json()))) == law
    for change in ({"format": 0}, {"E": -1.0}, {"A": "1"}, {"covariance": [[1.0]]}, {"exponents": None}, {"covers": 3}):
        with pytest.raises(ValueError):
            Law.from_json({**law.to_json(), **change})
    with pytest.raises(ValueError, match="not a scaling law"):
        Law.from_json([])


def test_the_law_that_comes_along_says_where_it_is_from():
    law = shipped_law()
    assert {"data", "machines", "command", "runs", "runs_made"} <= set(law.provenance)
    assert law.provenance["runs"] > 3 + len(law.blocks) + len(law.fitted_exponents)
    assert "/work" not in json.dumps(law.to_json()) and 0 < law.spread < 0.1
    assert {"nonzeros", "tokens", "density", "layers", "attention", "tokens_per_step"} == set(law.covers)
    more, longer = Point(1e6, 4e6), Point(2e6, 8e6)
    assert law.loss(longer) < law.loss(more) and law.loss(Point(1e6, 4e6, 0.1)) < law.loss(more)


# -- runs for it ------------------------------------------------------------------------------------------------------


def record(
    method: str | None, rate: float, loss: float, steps: int = 100, attention: int | None = None, **plan
) -> dict:
    """As `rarefy.compare.records` writes it, as far as it is looked at."""
    settings = {"width": 64, "layers": 2, "context": 32, "batch": 4, "accumulate": 1, "dense_lr": rate, **NETWORK}
    settings["attention"] = attention
    if method is not None:
        usual = {"method": {"name": method}, "block": 1, "distribution": "uniform", "low_rank": 0}
        settings |= {"plan": {**usual, **plan}, "lr": rate, "sparse_lr": rate, "ramp": 0}
    return {
        "task": "text", "state": "finished", "dense": method is None, "settings": settings, "nonzeros": [900, 900],
        "steps_taken": steps, "density": [0.1, 0.1], "curve": {"loss": [3.0, loss]},
    }  # fmt: skip


def test_a_record_becomes_a_run():
    run = run_of(record("set", 1e-3, 1.5, block=[4, 1]))
    assert run is not None
    assert (run.point, run.loss, run.tokens_per_step) == (Point(900, 100 * 128, 0.1, (4, 1), 2), 1.5, 128)
    narrow = run_of(record("set", 1e-3, 1.5, attention=16))
    assert narrow is not None and (run.attention, narrow.attention) == (1.0, 0.25) and run.network != narrow.network
    dense = run_of(record(None, 1e-3, 1.5))
    assert dense is not None and dense.point == Point(900, 12800, layers=2)
    assert run_of(record("rigl", 1e-3, 1.5)) is None and run_of(record("set", 1e-3, 1.5, low_rank=2)) is None
    assert run_of({**record("set", 1e-3, 1.5), "state": "diverged"}) is None
    assert run_of({**record("set", 1e-3, 1.5), "nonzeros": [900, 800]}) is None
    for name in NETWORK:  # of another network, or from before there was a choice
        other = record("set", 1e-3, 1.5)
        del other["settings"][name]
        assert run_of(other) is None


def test_of_several_rates_the_best_counts_length_by_length():
    said = [(1e-3, 1.5, 100), (1e-3, 1.7, 100), (2e-3, 1.4, 101), (2e-3, 1.5, 101), (1e-3, 1.0, 600), (2e-3, 1.1, 600)]
    runs = [run for rate, loss, steps in said if (run := run_of(record(None, rate, loss, steps))) is not None]
    assert [(run.rate, run.loss) for run in tuned(runs)] == [(2e-3, 1.4), (2e-3, 1.5), (1e-3, 1.0)]


def test_runs_judged_by_other_text_are_left_out(capsys):
    def judged(digest: str, eval_bytes: int):
        one = {**record(None, 1e-3, 1.5), "data": {"digest": digest}}
        one["settings"] = {**one["settings"], "eval_bytes": eval_bytes}
        run = run_of(one)
        assert run is not None
        return one, run

    same, longer, other = judged("a", 64), judged("a", 128), judged("b", 64)
    assert fit_scaling.judged_alike([longer, same, same, other]) == [same, same]
    assert "2 records were judged by other held-out bytes" in capsys.readouterr().out
    assert fit_scaling.judged_alike([]) == []


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the records are in the repository alone")
def test_the_tool_makes_the_law_that_comes_along(tmp_path, monkeypatch, capsys):
    kept = ("race/wikitext-2", "race/wikitext-2-avx2", "compare/wikitext-2-law")
    folders = [str(RESULTS / where / "runs") for where in kept]
    monkeypatch.setattr(fit_scaling, "LAW", tmp_path / "law.json")
    monkeypatch.setattr(fit_scaling, "FREE", ((), shipped_law().fitted_exponents))  # not all that the tool tries
    monkeypatch.setattr("sys.argv", ["fit_scaling.py", *folders, "--from-bytes", "1e6", "--write"])
    fit_scaling.main()
    made, law = Law.from_json(json.loads((tmp_path / "law.json").read_text())), shipped_law()
    assert pytest.approx((law.E, law.A, law.B)) == (made.E, made.A, made.B)
    assert made.spread == pytest.approx(law.spread) and made.covers == law.covers
    assert f"{law.provenance['runs']} of a tuned rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "scores, taken",
    [
        ({(): 0.05, ("b",): 0.048, ("g",): 0.05}, ()),  # not worth it
        ({(): 0.05, ("b",): 0.02, ("b", "g"): 0.019}, ("b",)),
        ({(): 0.05, ("b",): 0.048, ("b", "g"): 0.01}, ("b", "g")),
    ],
    ids=str,
)
def test_an_exponent_is_freed_where_that_is_worth_it(scores, taken):
    assert fit_scaling.choose_free(scores) == taken
