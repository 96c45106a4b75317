"""The cost model: what it fits, what it keeps, when it is asked, and that its check tells the truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy import cost
from rarefy.cost import CALIBRATED_BLOCKS, CostModel, Work, cache, dense_work, holdout
from rarefy.cost.batching import Batching
from rarefy.cost.calibration import calibrate
from rarefy.cost.model import Timed, error, fit, nnls
from rarefy.cost.points import CALIBRATED, HELD_OUT, LEAST_POINTS, Point, convolution
from rarefy.cost.precision import PRECISIONS, Precision, precision_now, working_in
from rarefy.cost.terms import terms
from rarefy.cost.work import PASSES

L2 = 2 << 20

SPARSE = {  # milliseconds a unit of work, of the size that an AVX-512 machine shows
    "call": 0.2,
    "pack_out": 3e-7,
    "pack_in": 4e-7,
    "products": 2e-8,
    "pattern": 5e-7,
    "segments": 1e-10,
}
DENSE = {"call": 0.05, "move_out": 1e-7, "weights": 2e-7, "products": 5e-9, "fresh": 1e-7}
SPARSE_CONV = {"pack_in": 5e-7, "pack_out": 6e-7, "cut": 1e-7, "products": 2e-8, "scattered_products": 1e-8}
DENSE_CONV = {"move_in": 2e-7, "weights": 3e-6, "products": 2e-8, "strided_products": 3e-8, "point_products": 1e-8}


def exact(work: Work, which, scale: float = 1.0) -> float:
    linear, convolving = (DENSE, DENSE_CONV) if work.block is None else (SPARSE, SPARSE_CONV)
    coefficients = convolving if work.convolves else linear
    amounts = terms(work, which, L2)
    return scale * sum(ms * amounts[name] for name, ms in coefficients.items())


def works(points, precision: Precision = "fp32") -> list[Work]:
    found = []
    for (out, inputs), density, tokens, conv in points:
        found.append(dense_work((out, inputs), tokens, precision, conv))
        for block in CALIBRATED_BLOCKS:
            entries = block[0] * block[1]
            units = max(1, round(density * out * inputs / entries))
            found.append(Work((out, inputs), tokens, units * entries, block, precision, conv))
    return found


def timings(points, scale: float = 1.0) -> list[Timed]:
    return [Timed(work, exact(work, "forward", scale) / 3, exact(work, "step", scale)) for work in works(points)]


def made(**more) -> CostModel:
    return fit(timings(CALIBRATED), l2_bytes=L2, **more)


# -- fitting ----------------------------------------------------------------------------------------------------------


def test_held_out_work_is_predicted_from_its_terms():
    model = made()
    for work in works(HELD_OUT):
        assert model.ms(work) == pytest.approx(exact(work, "step"), rel=1e-3)
        assert model.ms(work, "forward") == pytest.approx(exact(work, "forward") / 3, rel=1e-3)
    assert model.fitted["median_error"] < 1e-3 and model.fitted["points"] == len(timings(CALIBRATED))


def test_a_disturbed_timing_hardly_moves_the_model():
    disturbed = [
        Timed(t.work, t.forward_ms * 8, t.step_ms * 8) if at % 17 == 3 else t
        for at, t in enumerate(timings(CALIBRATED))
    ]
    model = fit(disturbed, l2_bytes=L2)
    errors = [abs(error(model, Timed(w, 1.0, exact(w, "step")))) for w in works(HELD_OUT)]
    assert max(errors) < 0.1


def test_coefficients_are_never_negative():
    rng = np.random.default_rng(0)

    def disturbed(ms: float) -> float:
        return ms * rng.uniform(0.7, 1.4)

    noisy = [Timed(t.work, disturbed(t.forward_ms), disturbed(t.step_ms)) for t in timings(CALIBRATED)]
    model = fit(noisy, l2_bytes=L2)
    assert all(value >= 0 for given in model.coefficients.values() for value in given.values())
    for kind in ("fp32 dense", "fp32 1x1", "fp32 16x16"):
        assert {f"{kind} {which}" for which in PASSES} <= set(model.coefficients)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_nnls_meets_the_conditions_of_an_optimum(rows, columns, seed):
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    found = nnls(matrix, target)
    slope = matrix.T @ (target - matrix @ found)
    assert (found >= 0).all()
    assert (slope <= 1e-7).all(), "no coefficient would gain by growing"
    assert np.abs(slope[found > 0]).max(initial=0.0) < 1e-7, "those in use are at their best"


def test_more_work_never_takes_less_time():
    model = made()
    for block in (None, (1, 1), (4, 4)):
        few, many = (Work((1024, 512), tokens, 52_416, block) for tokens in (256, 2048))
        denser = Work((1024, 512), 2048, 104_832, block)
        times = [model.ms(work) or math.nan for work in (few, many, denser)]
        assert times[0] < times[1] < times[2]


def test_what_was_not_timed_is_not_predicted():
    model = made()
    assert model.ms(Work((64, 64), 8, 64, (2, 2))) is None
    assert model.ms(dense_work((64, 64), 8, "bf16")) is None
    assert model.ms(dense_work((0, 64), 8)) is None and model.ms(dense_work((64, 64), 0)) is None
    assert cost.predict(model, (64, 64), 16, (2, 2), 8) is None


def test_there_are_more_points_than_terms_of_every_kind_and_none_is_held_out():
    least: dict[str, list[Work]] = {}
    for work in works(CALIBRATED[:LEAST_POINTS]):
        if work.conv is None or work.convolves:  # sparse products are not timed as convolutions
            least.setdefault(work.kind, []).append(work)
    assert len(least) == 2 * (1 + len(CALIBRATED_BLOCKS))
    for alike in least.values():
        amounts = [terms(work, "step", L2) for work in alike]
        in_use = {name for given in amounts for name, amount in given.items() if amount}
        assert len(in_use) <= len(alike), alike[0].kind
    assert not {(point.shape, point.conv) for point in CALIBRATED} & {(point.shape, point.conv) for point in HELD_OUT}
    for point in (*CALIBRATED, *HELD_OUT):
        assert point.shape[0] % 16 == point.shape[1] % 16 == 0 and 0 < point.density <= 1


# -- as data ----------------------------------------------------------------------------------------------------------


def test_json_round_trip():
    about = Batching(threads=3, lanes=8, dots=True)
    model = made(conditions={"cpu": "x", "threads": 2}, fitted={"date": "today"}, batching=about)
    assert model.batching == about and "fp32 conv 4x4 step" in model.coefficients
    again = CostModel.from_json(json.loads(json.dumps(model.to_json())))
    assert again == model


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": 1},
        {"batching": None},
        {"batching": {"threads": 0}},
        {"batching": {"threads": 2, "lines": 16}},
        {"coefficients": {"fp32 conv 1x1 step": {"first_panel": 1.0}}},
        {"coefficients": []},
        {"coefficients": {"fp32 1x1 step": {"call": -1.0}}},
        {"coefficients": {"fp32 1x1 step": {"call": float("inf")}}},
        {"coefficients": {"fp32 1x1 step": {"call": "1"}}},
        {"coefficients": {"fp32 1x1 step": {"unheard_of": 1.0}}},
        {"coefficients": {"fp32 1x1 step": 3}},
        {"l2_bytes": "large"},
        {"conditions": None},
    ],
    ids=str,
)
def test_what_is_no_model_is_refused(change):
    with pytest.raises(ValueError):
        CostModel.from_json({**made().to_json(), **change})
    with pytest.raises(ValueError, match="not a cost model"):
        CostModel.from_json([])


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrations(monkeypatch, tmp_path):
    """An empty cache folder, and the list of calibrations made; each is instant."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def instant(**_):
        calls.append(cost.conditions())
        return made(conditions=cost.conditions(), fitted={"date": str(len(calls))})

    monkeypatch.setattr(cache, "calibrate", instant)
    return calls


def test_a_machine_is_calibrated_once_and_anew_when_asked(calibrations):
    assert cost.load_model() is None
    first = cost.cost_model()
    assert cost.cost_model() == first == cost.load_model() and len(calibrations) == 1
    assert cost.cost_model(anew=True).fitted["date"] == "2"
    assert len(calibrations) == 2 and [p.name for p in cost.cache_path().parent.iterdir()] == [cost.cache_path().name]


def test_other_threads_or_limits_are_another_calibration(calibrations, monkeypatch):
    cost.cost_model()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert cost.load_model() is None
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cost.load_model() is None
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert cost.load_model() is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\x00", "nan", "[" * 100_000])
def test_a_file_that_does_not_fit_is_ignored_and_replaced(calibrations, text):
    path = cost.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert cost.load_model() is None
    cost.cost_model()
    assert cost.load_model() is not None


def test_a_file_of_other_conditions_is_ignored(calibrations):
    data = cost.cost_model().to_json()
    data["conditions"]["cpu"] = "another"
    cost.cache_path().write_text(json.dumps(data))
    assert cost.load_model() is None


def test_a_folder_that_cannot_be_written_costs_the_time_only(calibrations, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cost.cost_model().fitted["date"] == "1" and cost.save_model(made()) is None


def test_a_relative_cache_home_is_ignored_as_its_rules_say(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cost.cache_path({"cpu": "x"}).parent == tmp_path / ".cache" / "rarefy"


# -- precisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_is_set_inside_and_put_back(precision, before):
    usual, seen = torch.get_float32_matmul_precision(), []
    matmuls = "medium" if precision == "medium" else "highest"

    def fail() -> None:
        with working_in(precision):
            seen.append((precision_now(), torch.get_float32_matmul_precision()))
            raise RuntimeError("stop")

    try:
        torch.set_float32_matmul_precision(before)
        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert seen == [(precision, matmuls)]
        assert torch.get_float32_matmul_precision() == before and not torch.is_autocast_enabled("cpu")
        with working_in(precision, autocast=False):  # a backward pass
            assert torch.get_float32_matmul_precision() == matmuls and not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(usual)


# -- the real thing, tiny ---------------------------------------------------------------------------------------------


def test_calibration_times_every_structure_and_precision(monkeypatch):
    monkeypatch.setattr("rarefy.cost.calibration.SPARSE_POINT_S", 0.0)
    monkeypatch.setattr("rarefy.cost.calibration.DENSE_POINT_S", 0.0)
    state = torch.get_rng_state()
    model = calibrate(points=[Point((32, 48), 0.25, 16), Point((48, 32), 0.5, 8), convolution(3, 16, 5, 32, 0.3)])
    image = convolution(2, 16, 7, 64, 0.1)
    for block in CALIBRATED_BLOCKS:
        for precision in PRECISIONS:
            assert (model.ms(Work((64, 64), 32, 1024, block, precision)) or 0) > 0
            assert (model.ms(Work((64, 144), 98, 1024, block, precision, image.conv)) or 0) > 0
    for precision in cost.dense_precisions():
        assert (model.ms(dense_work((64, 64), 32, precision)) or 0) > 0
        assert (model.ms(dense_work((64, 144), 98, precision, image.conv)) or 0) > 0
    assert model.conditions == cost.conditions() and model.fitted["points"] > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_check_shows_both_times_and_counts_what_is_within(monkeypatch):
    model = made()

    def try_layer(point, block, precisions, **_):
        matching = next(w for w in works([point]) if w.block == block)
        slow = 1.5 if block == (4, 4) else 1.0
        return [Timed(matching, exact(matching, "forward") / 3, exact(matching, "step") * slow)]

    calls = []

    def timed(*arguments, **more):
        calls.append(arguments)
        return try_layer(*arguments, **more) if len(calls) > 1 else []  # the first only wakes the machine

    monkeypatch.setattr(holdout, "try_layer", timed)
    points = [*HELD_OUT[:2], *HELD_OUT[7:10]]
    assert [point.conv is None for point in points] == [True, True, False, False, False]
    found = cost.check(model, points=points)
    assert (found.again, len(calls)) == (5, 1 + 5 * 7 + 5 * holdout.TRIES)
    assert len(found.rows) == 5 * (1 + len(CALIBRATED_BLOCKS))
    off = [row for row in found.rows if row["structure"] == "4x4"]
    assert all(row["step_error"] == pytest.approx(1 / 1.5 - 1, abs=2e-3) for row in off)
    assert set(found.summary) == {"linear", "convolution"}
    for summary, layers in zip(found.summary.values(), (14, 21), strict=True):
        assert summary["forward"]["within"] == 1.0 and summary["step"]["within"] == pytest.approx(6 / 7)
        assert summary["step"]["layers"] == layers
    text = str(found)
    assert "linear layers, step: 86% of 14 within 20%" in text and "convolutions, step: 86% of 21 within 20%" in text
    assert "conv 128x64x3x3 at 32x32, stride 2, 64 images" in text and "-33%" in text
