"""Structures left open, times predicted, and precision as part of the choice."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rarefy import Plan, SparseLinear, sparsify
from rarefy.cli.main import main
from rarefy.cost import CALIBRATED_BLOCKS, PRECISIONS, CostModel, LayerCost, cache, conditions, layer_bytes
from rarefy.cost.work import PASSES
from rarefy.plan import times as timing
from rarefy.plan.explanation import Explanation
from rarefy.plan.structure import LEAST_UNITS, MARGIN, choose_block, fastest_block, possible_blocks
from tiny import flags, write_text

KINDS = ["dense", *(f"{rows}x{cols}" for rows, cols in CALIBRATED_BLOCKS)]


def costs(**per_product: float) -> CostModel:
    """A model in which only products take time: picoseconds of one, by kind such as `fp32_4x4` or `dense`.

    A kind without a precision is meant in all; one that is not named takes 10.
    """
    found = {}
    for precision, kind, which in itertools.product(PRECISIONS, KINDS, PASSES):
        name = f"{precision}_{kind}"
        found[f"{precision} {kind} {which}"] = {"products": 1e-9 * per_product.get(name, per_product.get(kind, 10.0))}
    return CostModel(found, 0, {}, {"date": "today"})


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 36))


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, chosen",
    [
        ({(1, 1): 1.0, (4, 4): 2.0}, (1, 1)),
        ({(1, 1): 1.0 + MARGIN, (4, 4): 1.0}, (1, 1)),  # within the margin: unstructured
        ({(1, 1): 1.2, (4, 4): 1.0}, (4, 4)),
        ({(1, 1): 2.0, (4, 4): 1.05, (16, 16): 1.0}, (4, 4)),  # the smaller of two that nearly tie
        ({(1, 1): 2.0, (8, 1): 1.0, (4, 1): 1.5}, (8, 1)),
        ({(16, 16): 3.0}, (16, 16)),
    ],
    ids=str,
)
def test_the_fastest_unless_a_smaller_unit_nearly_ties(times, chosen):
    assert fastest_block(times) == chosen


def test_blocks_must_divide_and_leave_a_pattern_to_find():
    assert possible_blocks((64, 64), 1.0) == [b for b in CALIBRATED_BLOCKS if 64 / max(b) >= LEAST_UNITS]
    assert possible_blocks((64, 36), 1.0) == [(1, 1), (4, 1), (8, 1), (4, 4)]
    assert possible_blocks((64, 64), 0.1) == [(1, 1)], "6.4 units a row, but 1.6 of four rows' columns"
    assert possible_blocks((7, 5), 0.01) == [(1, 1)], "unstructured always may"
    assert (16, 16) in possible_blocks((1024, 1024), 0.1) and (16, 16) not in possible_blocks((512, 1024), 0.1)


def test_the_choice_is_by_the_precision_that_torch_is_set_to():
    model = costs(fp32_4x4=1.0, bf16_8x1=1.0)
    assert choose_block(model, (512, 512), 0.2, 64) == (4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_block(model, (512, 512), 0.2, 64) == (8, 1)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_each_layer_gets_the_fastest_structure_that_fits_it():
    plan = Plan(density=0.5, block="auto")
    decisions = plan.decide(pair(), costs=costs(**{"8x8": 2.0, "4x4": 3.0, "dense": 20.0}))
    assert [d.block for d in decisions] == [(8, 8), (8, 8), (4, 4)], "8x8 does not divide 36 rows"
    assert all(d.is_sparse and d.tokens == timing.ASSUMED_TOKENS for d in decisions)
    assert sum(d.nnz for d in decisions[:2]) == 8192
    assert [d.cost.source for d in decisions if d.cost] == ["predicted"] * 3


def test_dense_wins_where_the_model_says_so():
    decisions = Plan(density=0.5, block="auto").decide(pair(), costs=costs(dense=1.0))
    assert all(not d.is_sparse and "dense, predicted, at density" in d.why_dense for d in decisions)


def test_counts_stay_exact_with_several_kinds_of_units():
    model = nn.Sequential(*(nn.Linear(256, rows) for rows in (64, 36, 33, 128)))
    plan = Plan(density=0.5, distribution="erk", block="auto")
    decisions = plan.decide(model, costs=costs(**{"8x8": 1.0, "4x4": 1.5, "dense": 1e3}))
    assert [d.block for d in decisions] == [(8, 8), (4, 4), (1, 1), (8, 8)]
    whole = sum(d.shape[0] * d.shape[1] for d in decisions)
    assert abs(sum(d.nnz for d in decisions) - 0.5 * whole) <= 64 / 2 + 16 / 2 + 1


def test_own_blocks_come_first_and_the_first_that_matches():
    plan = Plan(density=0.5, block="auto", block_overrides={"0": (4, 1), "[01]": 2})
    decisions = plan.decide(pair(), costs=costs(**{"8x8": 1.0, "dense": 1e3}))
    assert [d.block for d in decisions] == [(4, 1), (2, 2), (1, 1)]
    plan = Plan(density=0.5, block=8, block_overrides={"2": 4})
    assert [d.block for d in plan.decide(pair())] == [(8, 8), (8, 8), (4, 4)]
    with pytest.raises(ValueError, match="block_overrides: 'x' matches no layer"):
        Plan(density=0.5, block_overrides={"x": 4}).decide(pair())


def test_sparsify_keeps_a_plan_that_makes_the_same_layers_without_a_model(monkeypatch):
    monkeypatch.setattr(timing, "load_model", lambda: costs(**{"8x8": 1.0, "4x4": 5.0, "1x1": 1e4, "dense": 1e3}))
    model = pair()
    rewirer = sparsify(model, Plan(density=0.5, block="auto", keep_dense=("1",)))
    assert [m.block for m in model if isinstance(m, SparseLinear)] == [(8, 8), (4, 4)]
    monkeypatch.setattr(timing, "load_model", lambda: pytest.fail("asked again"))
    again = pair()
    sparsify(again, rewirer.plan)
    assert [getattr(m, "block", None) for m in again] == [(8, 8), None, (4, 4)]
    assert Plan.from_dict(json.loads(json.dumps(rewirer.plan.to_dict()))) == rewirer.plan


def test_nothing_is_predicted_or_timed_that_no_one_asked_for(monkeypatch):
    for name in ("load_model", "measure"):
        monkeypatch.setattr(timing, name, lambda *_, **__: pytest.fail("asked"))
    [first, *_] = Plan(density=0.5, block=4).decide(pair())
    assert first.cost is None and first.tokens is None
    Plan(density=0.5, block="auto", block_overrides={"*": 4}).decide(pair())


def test_measuring_times_what_the_model_chose(monkeypatch):
    asked = []

    def measure(shape, units, block, tokens, *, bias, precisions=False):
        asked.append((block, tokens, precisions))
        return LayerCost(1.0, 2.0)

    monkeypatch.setattr(timing, "measure", measure)
    model = costs(**{"8x8": 1.0})
    rows = Plan(density=0.5, block="auto").explain(pair()[:2], torch.randn(3, 64), costs=model).rows
    assert asked == [((8, 8), 3, True)] * 2 and {row["times"] for row in rows} == {"measured"}
    asked.clear()
    rows = Plan(density=0.5, block=4).explain(pair()[:2], torch.randn(3, 64), measure=False, costs=model).rows
    assert not asked and {row["times"] for row in rows} == {"predicted"} and rows[0]["tokens"] == 3
    Plan(density=0.5, block=4).decide(pair()[:2], measure=True)
    assert asked == [((4, 4), timing.ASSUMED_TOKENS, False)] * 2


def test_a_machine_without_a_model_is_calibrated_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = CostModel(costs().coefficients, 0, conditions(), {})
    monkeypatch.setattr(cache, "calibrate", lambda **_: made)
    with pytest.warns(UserWarning, match="calibrating the cost model of this machine, once, in about a minute"):
        Plan(density=0.5, block="auto").decide(pair())
    Plan(density=0.5, block="auto").decide(pair())  # warnings are errors nowhere, but the file is there now
    assert len(list((tmp_path / "rarefy").iterdir())) == 1


@pytest.mark.parametrize("block", ["Auto", "4x4", "", ("auto", 1)])
def test_other_words_are_refused(block: Any):
    with pytest.raises(ValueError, match="block must be a positive int"):
        Plan(density=0.5, block=block)


def test_a_layer_alone_cannot_choose():
    with pytest.raises(ValueError, match=r'block="auto" is for rarefy\.Plan'):
        SparseLinear(8, 8, density=0.5, block="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["block: auto", "block: 4\nblock_overrides: {'*.up': [4, 1], head: 1}"])
def test_yaml_round_trip(text, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(f"density: 0.1\n{text}\n")
    plan = Plan.from_yaml(file)
    file.write_text(plan.to_yaml())
    assert Plan.from_yaml(file) == plan and (
        plan.block == "auto" or plan.block_overrides == {"*.up": (4, 1), "head": 1}
    )


# -- precisions -------------------------------------------------------------------------------------------------------


def explained(**per_product: float) -> Explanation:
    plan = Plan(density=0.25, block=4, keep_dense=("2",))
    return plan.explain(pair(), measure=False, costs=costs(**per_product))


def test_options_are_timed_and_counted_for_every_precision():
    found = explained(fp32_dense=40.0, bf16_dense=2.0, bf16_4x4=9.0)
    row, _, kept = found.rows
    options = {option["name"]: option for option in row["options"]}
    shape, nnz, weights = (128, 64), 2048, 8192
    tokens = timing.ASSUMED_TOKENS
    assert options["dense bf16"]["ms"] == pytest.approx(2e-9 * weights * tokens)
    assert options["sparse bf16"]["ms"] == pytest.approx(9e-9 * nnz * tokens)
    assert options["sparse fp32"]["bytes"] == layer_bytes(shape, 128, (4, 4)) == row["bytes"]
    assert options["sparse bf16"]["bytes"] == layer_bytes(shape, 128, (4, 4), 2)
    assert options["sparse fp32"]["training_bytes"] == row["bytes"] + 12 * nnz
    assert options["dense fp32"]["training_bytes"] == 16 * weights
    assert options["dense bf16"]["training_bytes"] == 18 * weights, "a bf16 copy beside the fp32 weights"
    assert options["dense int8"] == {
        "name": "dense int8", "storage": "dense", "precision": "int8",
        "ms": None, "bytes": weights, "training_bytes": None,
    }  # fmt: skip
    assert row["best"] == {"time": "dense bf16", "bytes": "sparse bf16", "training_bytes": "sparse fp32"}
    assert [option["storage"] for option in kept["options"]] == ["dense"] * 4


def test_the_network_as_a_whole_says_when_dense_low_precision_wins():
    found = explained(fp32_dense=40.0, bf16_dense=2.0)
    totals, text = found.totals, str(found)
    options = {option["name"]: option for option in totals["options"]}
    rows = [{option["name"]: option for option in row["options"]} for row in found.rows]
    for precision in PRECISIONS:
        as_planned = [row.get(f"sparse {precision}", row[f"dense {precision}"]) for row in rows]
        for key in ("ms", "bytes", "training_bytes"):
            assert options[f"sparse {precision}"][key] == pytest.approx(sum(option[key] for option in as_planned))
            assert options[f"dense {precision}"][key] == pytest.approx(sum(r[f"dense {precision}"][key] for r in rows))
    assert totals["best"]["time"] == "dense bf16"
    assert "by time dense bf16 wins" in text and "sparse fp32" in text and "does not train dense layers in int8" in text
    assert f"times are for {timing.ASSUMED_TOKENS} tokens a step, assumed" in text
    assert "(3 predicted)" in text


def test_at_equal_bytes_indices_count_against_sparse():
    """Unstructured at 25%: 12 bytes a weight that exists, 3 of each that could, against int8's 1."""
    plan = Plan(density=0.25)
    best = plan.explain(nn.Sequential(nn.Linear(64, 128))).rows[0]["best"]
    assert best == {"time": None, "bytes": "dense int8", "training_bytes": "sparse fp32"}


# -- the command ------------------------------------------------------------------------------------------------------

TINY = ["--width", "64", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--density", "0.5"]


@pytest.fixture
def known(monkeypatch, tmp_path):
    """This machine's model, made up; how often it was calibrated."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def instant(*, progress, **_):
        progress("calibrating")
        calls.append(1)
        about = {"date": "today", "seconds": 1.0, "points": 7, "median_error": 0.03, "p90_error": 0.08}
        return CostModel(costs(**{"4x4": 1.0, "dense": 1e3}).coefficients, 0, conditions(), about)

    monkeypatch.setattr(cache, "calibrate", instant)
    return calls


def test_the_command_predicts_without_timing(known, monkeypatch, capsys):
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("timed"))
    assert main(["plan", *TINY, "--block", "auto", "--predict", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {tuple(row["block"]) for row in data["layers"] if row["kind"] == "sparse"} == {(4, 4)}
    assert all(row["times"] == "predicted" and row["tokens"] == 32 for row in data["layers"])
    assert data["cost_model"]["points"] == 7 and data["plan"]["block"] == "auto"
    assert main(["plan", *TINY, "--block", "auto", "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert "predicted for" in out and "cost model of today" in out and "assumed" not in out
    assert len(known) == 1


def test_the_command_predicts_convolutions(known, monkeypatch, capsys):
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("timed"))
    asked = ["plan", "--network", "wrn16x2", "--images", "4", "--density", "0.2", "--predict"]
    assert main([*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in data["layers"]}
    assert data["machine"]["images"] == 4 and rows["groups.0.0.conv2"]["kernel"] == [3, 3]
    assert rows["groups.0.0.conv2"]["tokens"] == 4 * 32 * 32 and rows["stem"]["kind"] == rows["head"]["kind"] == "dense"
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "wrn16x2, 4 images of 32x32 pixels a step" in out and "predicted for" in out
    assert main([*asked[:-1], "--budget", "1m"]) != 0
    assert "--network" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["0", "-1"])
def test_the_command_refuses_no_images(known, images, capsys):
    assert main(["plan", "--network", "wrn16x2", f"--images={images}", "--no-measure"]) != 0
    assert f"--images must be at least 1, got {images}" in capsys.readouterr().err


def test_the_command_calibrates_anew(known, capsys):
    for times in (1, 2):
        assert main(["plan", "--calibrate"]) == 0
        assert len(known) == times
    printed = capsys.readouterr()
    assert "calibrated in 1.0 s on 7 timings" in printed.out and "rarefy: calibrating" in printed.err


def test_the_command_shows_the_check(known, monkeypatch, capsys):
    monkeypatch.setattr("rarefy.cli.plan.check", lambda model, **_: perfect(model))
    assert main(["plan", "--check"]) == 0
    assert "within 20%" in capsys.readouterr().out
    assert main(["plan", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linear"]["step"]["within"] == 1.0


def perfect(model: CostModel):
    from rarefy.cost.holdout import Check
    from rarefy.cost.model import Timed
    from rarefy.cost.work import dense_work

    work = dense_work((64, 64), 64)
    return Check(model, [Timed(work, model.ms(work, "forward") or 0.0, model.ms(work) or 0.0)])


def test_a_run_keeps_the_structures_that_were_chosen(known, monkeypatch, tmp_path, capsys):
    text, run = write_text(tmp_path / "text.txt"), tmp_path / "run"
    options = ["--block", "auto", "--density", "0.5", "--width", "64", "--no-twin", "--no-report"]
    assert main(flags(text, "--run", str(run), *options, steps=4)) == 0
    rows = json.loads((run / "plan.json").read_text())["layers"]
    assert {tuple(row["block"]) for row in rows if row["kind"] == "sparse"} == {(4, 4)}
    monkeypatch.setattr(timing, "load_model", lambda: pytest.fail("asked again"))
    asked = Plan.from_dict(yaml.safe_load((run / "run.yaml").read_text())["plan"])  # what --resume reads
    assert asked.block == "auto" and asked.settled(rows).block_overrides == {
        row["name"]: (4, 4) for row in rows if row["kind"] == "sparse"
    }
    assert main(["generate", "--run", str(run), "--bytes", "4"]) == 0
