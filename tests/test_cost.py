"""Figures are fair, bytes are counted, totals add up."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy
from rarefy import cost, ops
from rarefy.cost import LayerCost, LayerStep, dense_layer, interleaved, interleaved_ms, layer_bytes, random_batch, spot
from rarefy.pattern import Pattern
from rarefy.plan.decision import Decision

# -- timing, with a clock that only the contenders advance ------------------------------------------------------------


class Clock:
    """Seconds that pass when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def lap(self, name: str, seconds):
        """A contender that takes these seconds, call after call; the last goes on for ever."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_rounds_visit_every_group_and_alternate_in_direction():
    clock = Clock()
    groups = [[clock.lap("a1", [1]), clock.lap("a2", [1])], [clock.lap("b", [1])], [clock.lap("c", [1])]]

    interleaved(groups, budget_s=0, rounds=25, clock=clock)

    warm_up = there = ["a1", "a2", "b", "c"]
    back = ["c", "b", "a1", "a2"]  # the laps of a group keep their order
    assert clock.log == [*warm_up, *there, *back, *there]


def test_every_lap_is_timed_by_itself_and_the_warm_up_is_not_counted():
    clock = Clock()
    groups = [[clock.lap("a", [100, 1, 2, 3]), clock.lap("b", [100, 10, 20, 30])], [clock.lap("c", [100, 7, 8, 9])]]

    times = interleaved(groups, budget_s=0, rounds=3, clock=clock)

    assert times == [[[1e3, 2e3, 3e3], [10e3, 20e3, 30e3]], [[7e3, 8e3, 9e3]]]


@pytest.mark.parametrize(
    "budget_s, rounds, expected",
    [
        (0.0, 25, 3),  # three whatever the budget
        (10.5, 25, 9),  # ten rounds of a second fit, one of them to warm up
        (1e9, 25, 25),
        (1e9, 1, 3),
    ],
)
def test_rounds_follow_budget_and_limit(budget_s, rounds, expected):
    clock = Clock()
    times = interleaved([[clock.lap("a", [1])]], budget_s=budget_s, rounds=rounds, clock=clock)
    assert len(times[0][0]) == expected


def test_medians_ignore_an_outlier(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(interleaved, "__kwdefaults__", {**(interleaved.__kwdefaults__ or {}), "clock": clock})
    slow_once = clock.lap("a", [1, 1, 50, 1, 1, 1])

    assert interleaved_ms([slow_once, clock.lap("b", [2])], budget_s=1e9, rounds=5) == [1e3, 2e3]


def test_the_collector_waits_while_timing_and_goes_on_after_an_error():
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("stop")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stop"):
        interleaved([[fail]], budget_s=0, rounds=3)
    assert seen == [False]
    assert gc.isenabled()


def test_a_step_gives_back_the_gradients_of_the_step_before():
    x, dy = random_batch((6, 4), 3, torch.Generator().manual_seed(0))
    layer = dense_layer((6, 4))
    step = LayerStep(layer, x, dy)
    step()
    first = layer.weight.grad, x.grad
    step()

    assert layer.weight.grad is not first[0] and x.grad is not first[1]
    torch.testing.assert_close(layer.weight.grad, dy.T @ x.detach())  # of one step, not the sum of two
    torch.testing.assert_close(x.grad, dy @ layer.weight.detach())
    assert layer.bias is not None and layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


# -- measuring layers -------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """Calls of the timer, whose answers are 1 ms, 2 ms, ... in order; the caches of earlier answers are empty."""
    calls: list[list] = []

    def fake(contenders, **_):
        calls.append(list(contenders))
        return [float(i + 1) for i in range(len(contenders))]

    monkeypatch.setattr(spot, "interleaved_ms", fake)
    spot._measure.cache_clear()
    yield calls
    spot._measure.cache_clear()


def test_measure_times_the_same_work_on_both(timed):
    found = cost.measure((8, 12), 24, (1, 1), 5, bias=False)

    assert found == LayerCost(1.0, 2.0) and found.speedup == 2.0
    (sparse, dense), *rest = timed
    assert not rest
    assert type(sparse) is type(dense) is LayerStep
    assert torch.equal(sparse.x, dense.x) and sparse.dy is dense.dy
    assert sparse.layer.pattern.num_units == 24 and sparse.layer.bias is None
    assert isinstance(dense.layer, nn.Linear) and dense.layer.bias is None
    assert (dense.layer.out_features, dense.layer.in_features) == (8, 12)


def test_measure_asks_once_per_question_threads_and_backend(timed):
    threads = torch.get_num_threads()
    cost.measure((8, 12), 24, (1, 1), 5)
    cost.measure((8, 12), 24, (1, 1), 5)
    assert len(timed) == 1
    cost.measure((8, 12), 25, (1, 1), 5)
    assert len(timed) == 2
    with ops.using("reference"):
        cost.measure((8, 12), 24, (1, 1), 5)
    assert len(timed) == 3
    torch.set_num_threads(threads + 1)
    try:
        cost.measure((8, 12), 24, (1, 1), 5)
    finally:
        torch.set_num_threads(threads)
    assert len(timed) == 4


def test_measure_times_every_precision_that_is_asked_for(timed, monkeypatch):
    monkeypatch.setattr(spot, "dense_precisions", lambda: ("fp32", "bf16"))
    found = cost.measure((8, 12), 24, (1, 1), 5, precisions=True)

    assert (found.ms("sparse", "fp32"), found.sparse_ms, found.precision) == (1.0, 1.0, "fp32")
    names = ["sparse fp32", "sparse medium", "sparse bf16", "dense fp32", "dense bf16"]
    assert [found.ms(*name.split()) for name in names] == [1.0, 2.0, 3.0, 4.0, 5.0]  # type: ignore[arg-type]
    assert found.ms("dense", "medium") is None
    steps = timed[0]
    assert [step.precision for step in steps] == ["fp32", "medium", "bf16", "fp32", "bf16"]
    assert steps[2].x.dtype == steps[2].dy.dtype == torch.bfloat16 and steps[2].x.requires_grad
    for step in steps:
        step()
        assert step.x.grad is not None and step.x.grad.dtype == step.x.dtype
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in step.layer.parameters())
    assert cost.measure((8, 12), None, (1, 1), 5).sparse_ms is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cost.measure((8, 12), 24, (1, 1), 5).precision == "bf16", "what torch is set to is what is timed"


def test_layers_that_differ_by_one_unit_are_timed_once(timed):
    cost.measure((64, 64), 2048, (1, 1), 2)
    cost.measure((64, 64), 2047, (1, 1), 2)
    assert len(timed) == 1
    cost.measure((64, 64), 4096, (1, 1), 2)  # rounding must not pass a full matrix
    assert timed[-1][0].layer.num_units <= 4096


def test_measuring_leaves_torchs_random_state(timed):
    before = torch.get_rng_state()
    cost.measure((8, 12), 24, (1, 1), 5)
    cost.measure_dense((8, 12), 5)
    assert torch.equal(torch.get_rng_state(), before)


# -- bytes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    density=st.floats(0.01, 1.0),
)
def test_layer_bytes_are_the_real_ones(rows, cols, block, density):
    shape = (rows * block[0], cols * block[1])
    layer = rarefy.SparseLinear(shape[1], shape[0], bias=False, density=density, block=block)
    held = [layer.values, layer.crow_indices, layer.col_indices, layer.t_crow, layer.t_rows, layer.t_perm]

    assert layer_bytes(shape, layer.num_units, block) == sum(t.numel() * t.element_size() for t in held)
    assert layer_bytes(shape, None, block) == 4 * shape[0] * shape[1]


def test_layer_bytes_of_indices_too_wide_for_16_bits():
    pattern = Pattern.from_units(torch.tensor([0, 70_000]), (1, 70_001))
    layer = rarefy.SparseLinear.from_pattern(pattern, bias=False)
    assert layer.col_indices.dtype == torch.int32
    assert layer_bytes(pattern.shape, 2, (1, 1)) == 4 * 2 + layer.index_bytes()


@pytest.mark.parametrize(
    "optimizer", [rarefy.AdamW, torch.optim.AdamW, torch.optim.SGD], ids=lambda cls: cls.__module__
)
def test_training_bytes_are_the_sums_of_what_exists(optimizer):
    layer = rarefy.SparseLinear(20, 12, density=0.25)
    model = nn.Sequential(layer, nn.Linear(12, 3), nn.Linear(3, 3))
    model[2].weight = model[2].weight.requires_grad_(False)
    model.add_module("again", model[1])  # shared modules count once
    made = optimizer(model.parameters(), lr=0.1)
    model[1](model[0](torch.randn(4, 20))).sum().backward()
    made.step()

    found = cost.training_bytes(model, made)

    trained = [layer.values, layer.bias, *model[1].parameters()]
    assert found["parameters"] == 4 * (60 + 12 + 36 + 3 + 9 + 3)
    assert found["gradients"] == 4 * sum(p.numel() for p in [*trained, model[2].bias])
    slots = [t for p in trained for t in made.state[p].values() if isinstance(t, torch.Tensor)]
    assert found["optimizer"] == sum(t.numel() * t.element_size() for t in slots)
    assert found["indices"] == layer.index_bytes() > 0


# -- explanations ----------------------------------------------------------------------------------------------------


def decision(name: str, units: int | None, times: LayerCost | None, why: str = "") -> Decision:
    return Decision(name=name, shape=(16, 8), why_dense=why, block=(2, 2), units=units, tokens=4, cost=times)


def test_explanation_totals_are_the_sums_of_its_rows():
    found = rarefy.Explanation(
        0.25,
        [
            decision("fast", 8, LayerCost(1.0, 3.0)),
            decision("slow", 8, LayerCost(5.0, 2.0), "sparse would be slower here"),
            decision("kept", None, LayerCost(None, 4.0), "kept dense as asked"),
            decision("never called", 4, None),
        ],
        rarefy.RigL(),
    )
    rows, totals = found.rows, found.totals

    for key in ("nnz", "bytes", "dense_bytes", "flops", "dense_flops"):
        assert totals[key] == sum(row[key] for row in rows)
    assert [row["nnz"] for row in rows] == [32, 128, 128, 16]
    assert totals["density"] == (32 + 16) / (2 * 128)
    assert totals["planned_ms"] == 1.0 + 2.0 + 4.0
    assert totals["dense_ms"] == 3.0 + 2.0 + 4.0
    assert totals["speedup"] == pytest.approx(9 / 7)
    assert (totals["timed_layers"], totals["sparse_layers"], totals["layers"]) == (3, 2, 4)
    assert found.to_json()["layers"] == rows
    assert "7.0 ms as planned, 9.0 ms if dense: 1.29x (3 timed)" in str(found)


def test_totals_without_a_sample_have_no_times():
    found = rarefy.Explanation(0.25, [decision("a", 8, None)], rarefy.RigL())
    assert found.totals["planned_ms"] is found.totals["dense_ms"] is found.totals["speedup"] is None
    assert " ms" not in str(found).split("\n", 2)[2]  # below the heading


def test_a_layer_left_dense_because_sparse_is_slower_keeps_its_figures(monkeypatch):
    times = {(32, 16): LayerCost(4.0, 1.0), (16, 32): LayerCost(1.0, 4.0), (16, 16): LayerCost(None, 7.0)}
    monkeypatch.setattr("rarefy.plan.times.measure", lambda shape, *rest, **more: times[shape])
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16))
    plan = rarefy.Plan(density=0.5, keep_dense=("2",))

    rows = plan.explain(model, torch.randn(3, 16)).rows

    figures = [(row["kind"], row["sparse_ms"], row["dense_ms"], row["speedup"]) for row in rows]
    assert figures == [("dense", 4.0, 1.0, 0.25), ("sparse", 1.0, 4.0, 4.0), ("dense", None, 7.0, None)]
    assert "4.00 ms against 1.00 ms dense" in rows[0]["reason"]
    assert rows[2]["tokens"] == 3


def test_layers_that_the_sample_does_not_reach_are_not_timed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr("rarefy.plan.times.measure", refuse)

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    rows = rarefy.Plan(density=0.5).explain(Idle(), torch.randn(2, 3, 8)).rows
    assert [row["dense_ms"] for row in rows] == list(itertools.repeat(None, 3))
