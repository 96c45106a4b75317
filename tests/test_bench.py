"""The bench: what it times, what it concludes, and what it prints. No test asserts a speed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import sys
import types

import pytest
import torch
from rich.console import Console
from torch import nn

from rarefy import probe
from rarefy.bench import Check, Crossing, Peer, Results, Row, Settings, Spread, break_even, installed, run
from rarefy.bench import timing as timing_module
from rarefy.bench.contender import Contender, rows, time_in_turn
from rarefy.bench.gpt import TrainingStep
from rarefy.bench.images import network
from rarefy.bench.layers import dense_contenders, sparse_contender
from rarefy.bench.settings import CNNS, Conv, gpt_config
from rarefy.cli import bench as command
from rarefy.cli import bench_tables
from rarefy.cli.bench import Bench, conv_of, wish
from rarefy.cli.bench_networks import CONVS
from rarefy.cli.bench_tables import show
from rarefy.cli.main import main
from rarefy.cost import dense_precisions, random_batch
from rarefy.models import GPT
from rarefy.nn import SparseLinear
from rarefy.ops import backend
from rarefy.pattern import Pattern
from rarefy.probe import Ceilings
from rarefy.report.bench import bench_page

SMALL = Settings(
    shapes=((16, 24),), densities=(0.25, 0.5), blocks=((1, 1), (4, 4)), tokens=(8,), seconds=0.1, peers=False
)
FLAGS = ["--shapes", "16x24", "--densities", "0.25", "--blocks", "1", "--dtypes", "fp32"]
FLAGS += ["--tokens", "8", "--seconds", "0.1"]

CEILINGS = Ceilings(fp32={"avx512": 100.0, "avx2": 50.0}, bf16_dot=150.0, bf16_tiles=900.0, l2_read=80.0)


@pytest.fixture(autouse=True)
def quick_look(monkeypatch):
    """The two looks at the machine take no time; what the probe does is tested in test_probe.py."""
    monkeypatch.setattr(timing_module, "REFERENCE_S", 0.0)
    monkeypatch.setattr(probe, "measure", lambda isas, seconds: CEILINGS)


def changed(**change) -> Settings:
    return dataclasses.replace(SMALL, **change)


# -- what follows from figures ----------------------------------------------------------------------------------------


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratios_are_taken_round_by_round():
    # The machine is ten times slower in one round: the times spread, the ratio does not.
    assert Spread.of_ratio([4.0, 40.0, 4.0], [2.0, 20.0, 2.0]) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "points, density, faster_at, slower_at",
    [
        ([(0.1, 2.0), (0.5, 2 / 3)], 0.3, 0.1, 0.5),  # 0.5 and 1.5 dense times: half-way between
        ([(0.5, 2 / 3), (0.1, 2.0)], 0.3, 0.1, 0.5),  # in any order
        ([(0.1, 4.0), (0.2, 1.25), (0.4, 0.5)], 0.2 + 0.2 * 0.2 / 1.2, 0.2, 0.4),
        ([(0.1, 2.0), (0.2, 1.0)], None, 0.2, None),
        ([(0.1, 2.0), (0.2, 1.5)], None, 0.2, None),  # nothing is extrapolated
        ([(0.1, 0.9), (0.2, 0.5)], None, None, 0.1),
        ([(0.1, 0.9), (0.2, 1.5)], None, None, 0.1),  # noise: slower where it should be fastest
        ([], None, None, None),
    ],
)
def test_break_even_is_interpolated_and_never_extrapolated(points, density, faster_at, slower_at):
    found = break_even(points)
    assert found.density == (None if density is None else pytest.approx(density))
    assert (found.faster_at, found.slower_at) == (faster_at, slower_at)


@pytest.mark.parametrize("last, disturbed", [(1.09, False), (1.11, True), (1 / 1.09, False), (1 / 1.11, True)])
def test_check_notices_a_machine_that_got_slower_or_faster(last, disturbed):
    for check in (
        Check(1.0, last),
        Check(1.0, 1.0, Ceilings(fp32={"avx2": 1.0}), Ceilings(fp32={"avx2": last})),
        Check(1.0, 1.0, Ceilings(l2_read=1.0), Ceilings(l2_read=last)),
    ):
        assert check.moved == pytest.approx(max(last, 1 / last) - 1)
        assert check.disturbed is disturbed


def test_a_check_names_what_moved_most():
    check = Check(1.0, 1.01, Ceilings(l2_read=80.0, bf16_dot=100.0), Ceilings(l2_read=60.0, bf16_dot=101.0))
    assert check.worst == "l2 read"
    assert check.to_dict()["readings"]["l2 read"] == {"first": 80.0, "last": 60.0}


def test_main_memory_is_shown_and_not_judged():
    check = Check(1.0, 1.0, Ceilings(memory_read=1.0), Ceilings(memory_read=2.0))
    assert check.readings()["memory read"] == (1.0, 2.0) and not check.disturbed


def our_row(*, density: float, speedup: float | None, **change) -> Row:
    spread = None if speedup is None else Spread(speedup, speedup, speedup)
    known = {"shape": (8, 8), "tokens": 4, "contender": "rarefy", "kernels": "avx2", "block": (1, 1), "rounds": 3}
    return Row(**{**known, "density": density, "speedup": spread, "speedup_fp32": spread, **change})


def test_efficiency_is_dense_time_times_density_over_sparse_time():
    assert our_row(density=0.1, speedup=5.0).efficiency == pytest.approx(0.5)
    assert our_row(density=0.1, speedup=None).efficiency is None
    assert our_row(density=1.0, speedup=0.5, contender="dense").efficiency is None
    assert our_row(density=0.1, speedup=3.0, kind="gpt").efficiency is None  # its attention is dense


def test_the_share_of_the_ceiling_is_of_what_was_compared():
    two = Spread(2.0, 2.0, 2.0)
    row = our_row(density=0.1, speedup=1.0, flops=40_000_000, ceiling_gflops=100.0, total_ms=two)
    assert (row.gflops, row.share) == (pytest.approx(20.0), pytest.approx(0.2))
    alone = dataclasses.replace(row, forward_only=True, forward_ms=Spread(1.0, 1.0, 1.0), total_ms=None)
    assert alone.share == pytest.approx(0.4)
    assert dataclasses.replace(row, ceiling_gflops=None).share is None


def test_break_evens_are_of_our_layers_only_each_dtype_by_itself():
    others = [
        our_row(density=0.9, speedup=9.0, contender="other"),
        our_row(density=0.9, speedup=9.0, kind="gpt"),
        our_row(density=0.2, speedup=2.0, dtype="bf16"),
    ]
    fp32 = [our_row(density=0.1, speedup=2.0), our_row(density=0.5, speedup=2 / 3, speedup_fp32=Spread(3, 3, 3))]
    results = Results(machine={}, settings={}, rows=fp32 + others, check=Check(1, 1), seconds=1)
    first, second = results.break_evens
    assert first.against_fastest.density == pytest.approx(0.3)
    assert first.against_fp32 == Crossing(None, 0.5, None)
    assert (second.dtype, second.against_fastest.faster_at) == ("bf16", 0.2)


# -- comparing --------------------------------------------------------------------------------------------------------


def contender(name: str, *laps: str, **more) -> Contender:
    return Contender(name=name, laps=dict.fromkeys(laps, lambda: None), flops=1, kernels="x", **more)


def test_rows_compare_with_dense_fp32_and_with_the_fastest_dense_of_the_same_rounds():
    both = ("forward", "backward")
    field = [
        contender("dense", *both),
        contender("dense", *both, dtype="bf16", compiled=True),
        contender("rarefy", *both, density=0.1),
        contender("peer", "forward"),
    ]
    times = [
        {"forward": [4.0, 8.0, 4.0], "backward": [8.0, 16.0, 8.0]},
        {"forward": [3.0, 6.0, 3.0], "backward": [3.0, 6.0, 3.0]},
        {"forward": [1.0, 2.0, 1.0], "backward": [2.0, 4.0, 2.0]},
        {"forward": [6.0, 12.0, 6.0]},
    ]
    fp32, bf16, ours, peer = rows("layer", (8, 8), 4, field, times)
    assert fp32.speedup_fp32 is None and fp32.speedup == Spread(0.5, 0.5, 0.5)
    assert bf16.speedup is None and bf16.speedup_fp32 == Spread(2.0, 2.0, 2.0)
    assert ours.speedup_fp32 == Spread(4.0, 4.0, 4.0) and ours.speedup == Spread(2.0, 2.0, 2.0)
    assert ours.fastest == "bf16 compiled" and ours.dense_ms == bf16.total_ms
    assert ours.efficiency == pytest.approx(0.2)
    assert peer.forward_only and peer.total_ms is None
    assert peer.speedup == Spread(0.5, 0.5, 0.5)  # forward against forward
    assert peer.speedup_fp32 is not None and peer.speedup_fp32.median == pytest.approx(4 / 6)


def test_laps_keep_their_names_and_what_is_not_counted_stays_out():
    ran: list[str] = []
    laps = {name: lambda name=name: ran.append(name) for name in ("forward", "backward", "rest", "growth")}
    one = Contender(name="dense", laps=laps, flops=1, kernels="x")
    (times,) = time_in_turn([one], budget_s=0.0, rounds=3)
    assert ran[:4] == ["forward", "backward", "rest", "growth"] and len(ran) == 16
    assert times.keys() == laps.keys() and all(len(taken) == 3 for taken in times.values())

    times = {"forward": [1.0], "backward": [2.0], "rest": [50.0], "dw": [2.0], "growth": [5.0]}
    (row,) = rows("layer", (8, 8), 4, [one], [times])
    assert row.total_ms == Spread(3.0, 3.0, 3.0)
    assert row.growth_ratio == Spread(2.5, 2.5, 2.5)


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, held, has, tiles",
    [
        (set(), None, False, False),
        ({"avx2"}, None, False, False),
        ({"avx512_bf16"}, None, True, False),
        ({"amx_bf16", "avx512_bf16"}, None, True, True),
        ({"amx_bf16", "avx512_bf16"}, "ALL", True, True),
        ({"amx_bf16", "avx512_bf16"}, "AVX512_CORE_BF16", True, False),
        ({"amx_bf16", "avx512_bf16"}, "AVX512_CORE_AMX", True, True),
        ({"amx_bf16", "avx512_bf16"}, "avx2", False, False),
    ],
)
def test_dense_bf16_is_timed_only_on_hardware_for_it(monkeypatch, flags, held, has, tiles):
    monkeypatch.setattr(probe, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if held is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert (probe.dense_has_bf16(), probe.dense_has_tiles()) == (has, tiles)
    assert dense_precisions() == (("fp32", "medium", "bf16") if has else ("fp32",))


# -- what is timed ----------------------------------------------------------------------------------------------------


def only_fp32(monkeypatch):
    monkeypatch.setattr(probe, "dense_has_bf16", lambda: False)


def test_run_has_a_row_for_every_shape_token_count_block_dtype_and_density(monkeypatch):
    only_fp32(monkeypatch)
    results = run(changed(tokens=(8, 4), dtypes=("fp32", "medium")))

    ours = [("rarefy", t, d, b) for b in [(1, 1), (4, 4)] for t in ["fp32", "medium"] for d in [0.25, 0.5]]
    expected = [("dense", "fp32", 1.0, (1, 1)), *ours]
    assert [(r.contender, r.dtype, r.density, r.block) for r in results.rows] == expected * 2
    assert [row.tokens for row in results.rows] == [8] * 9 + [4] * 9
    dense, *ours = results.rows[:9]
    for row in ours:
        assert row.rounds == dense.rounds >= 3
        for spread in (row.forward_ms, row.backward_ms, row.dx_ms, row.dw_ms, row.total_ms, row.speedup):
            assert spread is not None and 0 < spread.q1 <= spread.median <= spread.q3
        assert row.speedup == row.speedup_fp32 and row.fastest == "fp32"
        assert row.dense_ms == dense.total_ms  # the same rounds
        assert row.flops == 6 * round(row.density * 16 * 24) * 8
        for spread in (row.growth_ms, row.growth_ratio):  # the middle one of the densities, in the first dtype
            assert (spread is not None) == (row.density == 0.5 and row.dtype == "fp32")
    assert {"cpu", "isa", "dense_isa", "dense_bf16", "threads", "torch", "rarefy", "date"} <= results.machine.keys()
    assert len(results.break_evens) == 8


def test_dense_stands_beside_in_every_dtype_that_the_machine_has(monkeypatch):
    monkeypatch.setattr(probe, "dense_has_bf16", lambda: True)
    dense = [row for row in run(changed(dtypes=("bf16",))).rows if row.contender == "dense"]
    assert [row.dtype for row in dense] == ["fp32", "medium", "bf16"]
    assert all(row.dx_ms and row.dw_ms for row in dense)


@pytest.mark.parametrize("isa", [isa for isa in backend.available() if isa in ("avx2", "avx512")])
def test_ceilings_are_those_of_the_arithmetic_at_hand(monkeypatch, isa):
    monkeypatch.setattr(probe, "dense_has_bf16", lambda: True)
    monkeypatch.setattr(probe, "dense_has_tiles", lambda: True)
    monkeypatch.setattr(probe, "dense_isa", lambda: "avx512")
    results = run(changed(isa=isa, dtypes=("fp32", "bf16")))
    ceilings = {(row.contender, row.dtype): row.ceiling_gflops for row in results.rows}
    assert ceilings["dense", "fp32"] == 100 and ceilings["dense", "bf16"] == 900
    assert ceilings["rarefy", "fp32"] == {"avx2": 50, "avx512": 100}[isa]
    assert ceilings["rarefy", "bf16"] == {"avx2": 50, "avx512": 150}[isa]
    assert any("dense torch may use avx512" in note for note in results.notes) == (isa == "avx2")


def test_more_than_the_ceiling_is_noted(monkeypatch):
    only_fp32(monkeypatch)
    low = Ceilings(fp32=dict.fromkeys(backend.available(), 1e-9))
    monkeypatch.setattr(probe, "measure", lambda isas, seconds: low)
    assert sum("the probe was disturbed" in note for note in run(SMALL).notes) == 1
    monkeypatch.setattr(probe, "measure", lambda isas, seconds: CEILINGS)
    assert not any("the probe was disturbed" in note for note in run(SMALL).notes)


def test_bf16_products_that_are_slower_than_fp32_are_no_ceiling():
    slow = dataclasses.replace(CEILINGS, bf16_dot=30.0)
    assert slow.peak("bf16", "avx512") == 100
    assert slow.peak("bf16", "portable") is None


def test_the_laps_compute_what_they_are_named_after(monkeypatch):
    only_fp32(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, dy = random_batch((16, 24), 8, generator)
    exact = dy.T @ x.detach()

    (dense,) = dense_contenders((16, 24), x, dy, SMALL, [])
    torch.testing.assert_close(dense.laps["dw"](), exact)
    assert dense.flops == 6 * 16 * 24 * 8

    layer = SparseLinear.from_pattern(Pattern.random((16, 24), 0.25, 4, generator), generator=generator)
    ours = sparse_contender(layer, x, dy, "fp32", "avx2", with_growth=True)
    ours.laps["forward"]()
    ours.laps["backward"]()
    torch.testing.assert_close(ours.laps["dx"](), dy @ layer.dense_weight())
    blocks = exact.view(4, 4, 6, 4).transpose(1, 2).reshape(24, 4, 4)
    units = layer.pattern.unit_indices()
    torch.testing.assert_close(ours.laps["dw"](), blocks[units])
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, blocks[units])
    found = ours.laps["growth"]()
    assert isinstance(found, tuple)
    grown, scores = found
    assert len(grown) == 2  # 30% of the 6 that exist
    assert not set(grown.tolist()) & set(units.tolist())
    torch.testing.assert_close(scores, blocks.abs().mean(dim=(1, 2))[grown])


def test_bf16_laps_hand_bf16_activations_and_keep_fp32_values():
    x, dy = random_batch((16, 24), 8, torch.Generator().manual_seed(0))
    layer = SparseLinear.from_pattern(Pattern.random((16, 24), 0.5, 1, torch.Generator().manual_seed(1)))
    ours = sparse_contender(layer, x, dy, "bf16", "avx2", with_growth=False)
    ours.laps["forward"]()
    ours.laps["backward"]()
    dx = ours.laps["dx"]()
    assert isinstance(dx, torch.Tensor) and dx.dtype == torch.bfloat16
    assert layer.values.grad is not None and layer.values.grad.dtype == torch.float32


def test_dense_is_compiled_when_asked_and_a_failure_is_noted(monkeypatch):
    only_fp32(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)
    compiled = [row for row in run(changed(compiled=True)).rows if row.compiled]
    assert [(row.contender, row.dtype) for row in compiled] == [("dense", "fp32")]
    assert compiled[0].total_ms and compiled[0].dx_ms is None

    def broken(module, **how):
        raise RuntimeError("no working compiler\nmore about it")

    monkeypatch.setattr(torch, "compile", broken)
    results = run(changed(compiled=True, tokens=(8, 4), gpt=((16, 1),), context=4, step_tokens=8))
    assert not any(row.compiled for row in results.rows)
    assert results.notes.count("torch.compile does not work here: no working compiler") == 1


def test_threads_and_backend_are_set_while_timing_and_set_back(monkeypatch):
    only_fp32(monkeypatch)
    threads = torch.get_num_threads()
    results = run(changed(blocks=((1, 1),), threads=threads + 1, isa="tiled"))

    assert results.machine["threads"] == threads + 1
    assert {row.kernels for row in results.rows if row.contender == "rarefy"} == {"tiled"}
    assert torch.get_num_threads() == threads
    assert backend._named == "auto"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shapes": ()}, "neither shapes nor GPTs"),
        ({"densities": ()}, "densities is empty"),
        ({"densities": (0.0,)}, "density must lie in"),
        ({"blocks": ((5, 5),)}, "5x5 does not divide a 16x24"),
        ({"tokens": (8, 0)}, "tokens must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"dtypes": ("bf61",)}, "did you mean 'bf16'"),
        ({"gpt": ((64, 0),)}, "layers must be at least 1"),
        ({"step_tokens": 100}, "100 tokens of a step must be a multiple of the context, 256"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        changed(**change)


def test_a_backend_that_is_not_there_is_refused_before_timing(monkeypatch):
    monkeypatch.setattr(timing_module, "interleaved", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ValueError, match="'sse' is not available here; there are: reference, tiled"):
        run(changed(isa="sse"))


def test_the_time_is_shared_by_flops_with_a_least_for_small_layers():
    settings = changed(shapes=((1024, 1024), (16, 16)), tokens=(2048,), gpt=((256, 4),), seconds=60.0)
    jobs = timing_module._jobs(settings, with_apart=True)
    assert [job.kind for job in jobs] == ["layer", "layer", "apart", "apart", "gpt"]
    large, small, apart, _, gpt = jobs
    assert small.budget_s == timing_module.LEAST_S
    assert large.budget_s == pytest.approx(3 * apart.budget_s)
    assert gpt.budget_s == pytest.approx(3 * (large.budget_s + apart.budget_s), rel=1e-3)  # 12 w^2 l = 3 x 1024^2
    assert sum(job.budget_s for job in jobs) == pytest.approx(60, abs=4)


# -- whole steps ------------------------------------------------------------------------------------------------------


def test_a_gpt_is_timed_in_three_parts_beside_its_dense_twin(monkeypatch):
    only_fp32(monkeypatch)
    results = run(changed(shapes=(), gpt=((16, 1),), densities=(0.25,), context=4, step_tokens=8, blocks=((4, 4),)))
    dense, ours = results.rows
    assert (dense.kind, dense.shape, dense.tokens, dense.contender) == ("gpt", (16, 1), 8, "dense")
    assert ours.density == pytest.approx(0.25) and ours.block == (4, 4)
    for row in (dense, ours):
        assert row.forward_ms and row.backward_ms and row.optimizer_ms and row.total_ms
        assert row.dx_ms is row.dw_ms is row.efficiency is None
    weights = 12 * 16 * 16
    assert dense.flops - ours.flops == 6 * 8 * weights * 3 // 4
    assert results.break_evens == []


def test_a_training_step_clips_and_learns_in_every_dtype():
    model = GPT(gpt_config(16, 1, 4), torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs = torch.randint(0, 256, (2, 4), generator=torch.Generator().manual_seed(0))
    losses = []
    for dtype in ("fp32", "medium", "bf16") * 4:
        step = TrainingStep(model, optimizer, inputs, inputs, dtype)
        assert list(step.laps()) == ["forward", "backward", "optimizer"]
        before = [p.detach().clone() for p in model.parameters()]
        step()
        moved = sum((p.detach() - b).square().sum() for p, b in zip(model.parameters(), before, strict=True))
        assert 0 < float(moved) ** 0.5 <= 0.5 * 1.0 + 1e-4  # rate times the largest norm
        losses.append(step.loss)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_layers_that_a_block_does_not_fit_are_named(monkeypatch):
    only_fp32(monkeypatch)
    results = run(changed(shapes=(), gpt=((20, 1),), densities=(0.25,), context=4, step_tokens=8, blocks=((16, 16),)))
    assert any(note.startswith("GPT 20x1, 16x16: left dense: blocks.0.attention.qkv") for note in results.notes)
    assert [row.contender for row in results.rows] == ["dense"]  # nothing sparse is left to be shown


# -- peers ------------------------------------------------------------------------------------------------------------


class FakeSparseLinear(nn.Module):
    """As SparseLab's: a random pattern of its own, with a slot of padding."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, sparsity: float = 0.9) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.density = 1 - sparsity - 0.01

    def forward(self, x):
        return self.linear(x)


class FakeSparsePropLinear(nn.Module):
    """As SparseProp's: made from a dense weight, of which it keeps what is not zero, and a bias that is a parameter."""

    def __init__(self, dense_weight, bias=None):
        super().__init__()
        assert bias is None or isinstance(bias, nn.Parameter)
        self.kept = dense_weight != 0
        self.W_val, self.bias = nn.Parameter(dense_weight[self.kept]), bias

    def forward(self, x):
        return nn.functional.linear(x, torch.zeros(self.kept.shape).masked_scatter(self.kept, self.W_val), self.bias)


@pytest.fixture(autouse=True)
def no_peers(monkeypatch):
    """As if nothing but torch were installed."""
    for name in ("sparselab", "sparseprop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("rarefy.bench.peers.find_spec", lambda name: None)


@pytest.fixture
def fake_sparselab(no_peers, monkeypatch):
    module = types.ModuleType("sparselab")
    module.__dict__.update(SparseLinear=FakeSparseLinear, __version__="0.0.1")
    monkeypatch.setitem(sys.modules, "sparselab", module)


@pytest.fixture
def fake_sparseprop(no_peers, monkeypatch):
    module, modules = types.ModuleType("sparseprop"), types.ModuleType("sparseprop.modules")
    modules.__dict__.update(SparseLinear=FakeSparsePropLinear)
    monkeypatch.setitem(sys.modules, "sparseprop", module)
    monkeypatch.setitem(sys.modules, "sparseprop.modules", modules)


def peer_named(name: str) -> Peer:
    return next(peer for peer in installed(1, []) if peer.name.startswith(name))


def test_sparselab_is_timed_forward_and_backward_after_everything_else(fake_sparselab):
    results = run(changed(peers=True))

    *others, first, second = results.rows
    assert all("SparseLab" not in row.contender for row in others)
    for row, density in ((first, 0.25), (second, 0.5)):
        assert row.contender == "SparseLab 0.0.1" and row.block == (1, 1)
        assert row.density == pytest.approx(density - 0.01)  # its own, not what was asked
        assert row.total_ms is not None and row.speedup is not None and not row.forward_only
        assert row.dense_ms != results.rows[0].total_ms  # dense was timed again, in the peers' rounds
        assert row.dx_ms is row.dw_ms is row.growth_ms is None


def test_the_rest_after_a_peer_is_not_counted(fake_sparselab, monkeypatch):
    monkeypatch.setattr("rarefy.bench.peers.REST_S", 0.1)
    row = run(changed(peers=True, densities=(0.5,))).rows[-1]
    assert row.total_ms is not None
    assert row.contender.startswith("SparseLab") and row.total_ms.q1 < 100


def test_sparseprop_computes_our_pattern_in_our_rounds(fake_sparseprop):
    pattern = Pattern.random((6, 9), 0.3, generator=torch.Generator().manual_seed(0))
    x, dy = torch.randn(4, 9, requires_grad=True), torch.randn(4, 6)
    peer = peer_named("SparseProp of unknown version")
    entry = peer.enter(pattern, x, dy)
    entry.laps["forward"]()
    entry.laps["backward"]()
    weight = torch.zeros(6, 9)
    weight[pattern.to_mask()] = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.grad, dy @ weight)
    assert entry.density == pattern.density and not peer.own_threads


def test_a_peer_that_fails_is_noted_and_left_out(fake_sparseprop, monkeypatch):
    monkeypatch.setattr("rarefy.bench.peers.LARGEST_EXACT", 10)
    results = run(changed(peers=True))
    assert not any("SparseProp" in row.contender for row in results.rows)
    assert any(re.match(r"SparseProp .* cannot run 16x24: its row pointers are wrong", n) for n in results.notes)


def test_without_others_only_torch_is_beside_us():
    notes: list[str] = []
    assert [peer.name for peer in installed(2, notes)] == ["torch CSR", "torch BSR"]
    assert notes == []


def test_a_peer_that_cannot_be_imported_is_noted(monkeypatch, tmp_path):
    monkeypatch.undo()
    for name in ("sparselab", "sparseprop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "sparselab.py").write_text("raise ImportError('built for another torch')")
    (tmp_path / "sparseprop.py").write_text("raise OSError('no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    notes: list[str] = []
    assert [peer.name for peer in installed(2, notes)] == ["torch CSR", "torch BSR"]
    assert notes == [
        "SparseLab is installed, but cannot be imported: built for another torch",
        "SparseProp is installed, but cannot be imported: no such file",
    ]


@pytest.mark.parametrize("before", [None, "7"])
def test_a_peer_is_told_the_threads_while_it_loads(monkeypatch, tmp_path, before):
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "sparselab", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    (tmp_path / "sparselab.py").write_text("import os\n__version__ = os.environ['OMP_NUM_THREADS']")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "SparseLab 3" in [peer.name for peer in installed(3, [])]
        assert os.environ.get("OMP_NUM_THREADS") == before
    finally:
        sys.modules.pop("sparselab", None)


@pytest.mark.parametrize("name, block", [("torch CSR", (1, 1)), ("torch BSR", (4, 4))])
def test_torch_layouts_are_a_forward_and_right(name, block):
    peer = peer_named(name)
    assert peer.block == block
    pattern = Pattern.random((8, 12), 0.5, block, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 12)
    entry = peer.enter(pattern, x, torch.randn(4, 8))
    assert list(entry.laps) == ["forward"] and entry.density == pattern.density

    values = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(0))
    units = values.view(-1, *block)
    weight = torch.zeros(8 // block[0], 12 // block[1], *block)
    weight.view(-1, *block)[pattern.unit_indices()] = units
    torch.testing.assert_close(entry.laps["forward"](), x @ weight.transpose(1, 2).reshape(8, 12).T)


# -- the command ------------------------------------------------------------------------------------------------------


def test_json_on_stdout_is_json_and_nothing_else(capsys, tmp_path, monkeypatch):
    only_fp32(monkeypatch)
    assert main(["bench", *FLAGS, "--json", "--out", str(tmp_path / "bench.json")]) == 0

    out = capsys.readouterr().out
    data = json.loads(out)
    assert (tmp_path / "bench.json").read_text() == out
    assert [row["contender"] for row in data["rows"]] == ["dense", "rarefy", "torch CSR", "torch BSR"]
    ours = data["rows"][1]
    assert ours["efficiency"] == pytest.approx(ours["speedup"]["median"] * ours["density"])
    assert ours["share"] == pytest.approx(ours["gflops"] / ours["ceiling_gflops"])
    assert data["settings"]["shapes"] == [[16, 24]]
    assert data["check"].keys() == {"readings", "worst", "moved", "disturbed"}
    assert [found["block"] for found in data["break_even"]] == [[1, 1]]


def test_a_table_says_machine_shapes_and_how_to_read_it(capsys):
    assert main(["bench", *FLAGS, "--gpt", "16x1", "--context", "4", "--step-tokens", "8"]) == 0
    out = capsys.readouterr().out
    said = [torch.__version__, "threads", "16x24, 8 tok.", "rarefy 1x1 fp32", "torch CSR", "torch BSR", "efficiency"]
    for text in [*said, "break-even", "fp32 avx512 100 GFLOP/s", "l2 read 80 GB/s", "GPT 16x1", "bwd"]:
        assert text in out
    assert max(len(line.rstrip()) for line in out.split("Milliseconds")[0].splitlines()[2:]) <= 100


@pytest.mark.parametrize("wide, limit", [(True, 100), (False, 80)])
def test_a_full_table_fits(wide, limit):
    ms, speed = Spread(123.45, 120.0, 130.0), Spread(12.34, 11.22, 13.44)
    row = our_row(density=0.125, speedup=None, block=(16, 16), dtype="medium", shape=(16384, 4096), tokens=16384)
    row = dataclasses.replace(
        row, forward_ms=ms, dx_ms=ms, dw_ms=ms, backward_ms=ms, total_ms=ms, speedup=speed, speedup_fp32=speed,
        flops=10**9, ceiling_gflops=100.0, growth_ratio=speed,
    )  # fmt: skip
    dense = dataclasses.replace(row, contender="dense", dtype="medium", compiled=True)
    console = Console(width=limit, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(bench_tables.table([dense, row], "avx2", wide=wide))
    text = console.export_text()
    assert "…" not in text and "rarefy 16x16 medium" in text and " dense medium compiled" in text
    assert ("11.22-13.44" in text) is wide and "12.34x" in text


def test_a_disturbed_machine_is_told(capsys, monkeypatch):
    readings = iter([(10.0, CEILINGS), (13.0, CEILINGS)])
    monkeypatch.setattr(timing_module, "_look", lambda settings: next(readings))
    assert main(["bench", *FLAGS, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["check"]["disturbed"] is True
    assert "30% apart" in printed.err


def test_results_are_saved_under_date_processor_and_instruction_set(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {"cpu": "Intel(R) Xeon(R) CPU @ 2.60GHz", "isa": "avx512", "threads": 2, "torch": "2", "rarefy": "0"}
    monkeypatch.setattr(timing_module, "machine", lambda: dict(about))
    assert main(["bench", *FLAGS, "--no-peers", "--json", "--save"]) == 0
    (saved,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-intel-xeon-cpu-2-60ghz-avx512-2t\.json", saved.name)
    assert saved.read_text() == capsys.readouterr().out

    assert main(["bench", *FLAGS, "--no-peers", "--json", "--save"]) == 0  # beside it, not over it
    assert {path.name for path in saved.parent.iterdir()} == {saved.name, f"{saved.stem}-2.json"}


def test_a_page_is_written_whole_and_offline(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "dense_has_bf16", lambda: True)
    page = tmp_path / "bench.html"
    more = ["--densities", "0.25", "0.5", "--tokens", "8", "4", "--gpt", "16x1", "--context", "4", "--step-tokens", "8"]
    assert main(["bench", *FLAGS, *more, "--html", str(page)]) == 0
    text = page.read_text()
    (drawn,) = re.findall(r'<script id="figure-data" type="application/json">(.*?)</script>', text)
    figures = json.loads(drawn)
    assert list(figures) == ["speed", "time", "step", "tokens", "share"]
    assert [view["label"] for view in figures["speed"]] == ["16×24, 8 tokens", "16×24, 4 tokens"]
    assert [trace["meta"] for trace in figures["step"][0]["data"]] == ["forward", "backward", "optimizer"]
    for said in ("dense bf16", "1×1 fp32, 25%", "torch BSR", "Break-even density", "GPT 16×1", "default-src 'none'"):
        assert said in text
    own = text[: text.index('<script id="figure-data"')]
    assert not re.findall(r"https?:|src=|@import|url\(", own)


def test_every_line_of_a_plot_looks_like_no_other():
    from rarefy.report.bench_figures import bench_figures

    rows = [
        our_row(density=density, speedup=2.0, block=block, dtype=dtype, total_ms=Spread(1, 1, 1))
        for block in ((1, 1), (4, 1), (4, 4), (8, 8), (16, 16))
        for dtype in ("fp32", "medium", "bf16")
        for density in (0.1, 0.2)
    ]
    data = Results(machine={}, settings={}, rows=rows, check=Check(1.0, 1.0), seconds=1.0, notes=[]).to_json()
    (speed,) = [figure for figure in bench_figures(data) if figure.id == "speed"]
    lines = [trace["line"] for trace in speed.views[0].data if "meta" in trace]
    assert len({(line["color"], line["dash"]) for line in lines}) == len(lines) >= 15


def test_a_page_says_that_the_machine_was_disturbed_and_escapes_what_it_was_told():
    from rarefy.report.bench import bench_page

    row = our_row(density=0.1, speedup=2.0, contender="<b>peer</b>", total_ms=Spread(1, 1, 1))
    results = Results(
        machine={"cpu": "<script>", "threads": 1, "isa": "x", "date": "2026-01-31"}, settings={}, rows=[row],
        check=Check(1.0, 2.0), seconds=1.0, notes=["<i>note</i>"],
    )  # fmt: skip
    page = bench_page(results.to_json())
    assert "dense reference moved by 100%" in page
    for raw in ("<b>peer", "<i>note", "<script>\xb7"):
        assert raw not in page


@pytest.mark.parametrize("flag", ["--out", "--html"])
def test_a_file_in_no_folder_is_refused_before_timing(capsys, monkeypatch, tmp_path, flag):
    monkeypatch.setattr(command, "run_bench", lambda *_, **__: pytest.fail("timed"))
    assert main(["bench", *FLAGS, flag, str(tmp_path / "none" / "x")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shapes", "512"], "shapes: '512' is none; write them like 4096x1024"),
        (["--shapes", "512xtall"], "shapes: '512xtall'"),
        (["--gpt", "512"], "gpt: '512' is none; write them like 512x6"),
        (["--blocks", "0"], "blocks: 0 is none; write them like 4 or 4x1"),
        (["--densities", "20"], "density must lie in (0, 1], got 20.0"),
        (["--dtypes", "fp16"], "dtypes: there is no 'fp16'"),
        (["--isa", "mmx"], "'mmx' is not available here"),
        (["--blocks", "3"], "3x3 does not divide"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, flags, message):
    assert main(["bench", *FLAGS, *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_yaml_file_says_the_same_and_flags_override_it(capsys, tmp_path):
    file = tmp_path / "bench.yaml"
    file.write_text(
        "shapes: [16x24]\nblocks: [1, 4x1]\ndensities: [0.5]\ndtypes: [fp32]\ntokens: [8]\nseconds: 0.1\npeers: false\n"
    )
    assert main(["bench", "--config", str(file), "--tokens", "4", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"]["blocks"] == [[1, 1], [4, 1]]
    assert data["settings"]["tokens"] == [4, 2]


@pytest.mark.parametrize(
    "speedups, said",
    [
        ({0.1: 2.0, 0.5: 2 / 3}, "~0.3 (0.1 to 0.5)"),
        ({0.1: 2.0}, "faster up to 0.1"),
        ({0.1: 0.5}, "slower from 0.1"),
    ],
)
def test_break_even_table_says_how_it_knows(speedups, said):
    rows = [our_row(density=density, speedup=speedup) for density, speedup in speedups.items()]
    results = Results(machine={}, settings={}, rows=rows, check=Check(1, 1), seconds=1)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(bench_tables.break_evens(results))
    assert console.export_text().splitlines()[1].count(said) == 2  # against fp32 and against the fastest


# -- rarefy plan ------------------------------------------------------------------------------------------------------

TINY = ["--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2"]


def test_plan_lists_layers_totals_and_times(capsys):
    assert main(["plan", *TINY, "--density", "0.25", "--block", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)

    names = [f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]
    assert [row["name"] for row in data["layers"]] == [*names, "head"]
    assert data["machine"]["tokens"] == 32
    for row in data["layers"]:
        assert row["tokens"] == 32 and row["dense_ms"] > 0
        if row["name"] == "head":
            assert row["kind"] == "dense" and row["sparse_ms"] is None
        else:  # whatever was decided, with both figures
            assert row["sparse_ms"] > 0 and row["block"] == [4, 4]
            assert (row["kind"] == "dense") == (row["speedup"] < 1)
    assert data["totals"]["timed_layers"] == 5
    assert data["plan"]["density"] == 0.25


def test_plan_without_measuring_takes_no_time_and_all_layers(capsys, monkeypatch):
    monkeypatch.setattr("rarefy.cost.interleaved", lambda *_, **__: pytest.fail("timed"))
    assert main(["plan", *TINY, "--no-measure", "--method", "set", "--keep-dense", "head", "*.out", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in data["layers"]] == ["sparse", "dense", "sparse", "sparse", "dense"]
    assert data["plan"]["method"]["name"] == "set"
    assert data["totals"]["planned_ms"] is None


def test_plan_of_a_large_network_needs_no_memory(capsys):
    # Half a terabyte of dense weights.
    flags = ["--width", "32768", "--heads", "64", "--layers", "12", "--density", "0.01"]
    assert main(["plan", *flags, "--no-measure", "--block", "64"]) == 0
    assert "48 of 49 layers sparse, density 0.01" in capsys.readouterr().out


def test_plan_reads_a_file_and_flags_override_it(capsys, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("density: 0.5\nkeep_dense: [head]\nmethod: static\n")
    assert main(["plan", *TINY, "--plan", str(file), "--no-measure", "--distribution", "erk", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["density"], plan["method"]["name"], plan["distribution"]) == (0.5, "static", "erk")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--density", "1.5"], "density must lie in (0, 1]"),
        (["--method", "rgl"], "did you mean 'rigl'"),
        (["--heads", "3"], "3 heads"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--plan", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_plan_refuses_bad_input_in_one_line(capsys, flags, message):
    assert main(["plan", *TINY, "--no-measure", *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_plan_says_what_a_block_that_does_not_divide_leads_to(capsys):
    assert main(["plan", "--width", "36", "--heads", "2", "--layers", "1", "--no-measure", "--block", "8"]) == 0
    out = capsys.readouterr().out
    assert "a block of 8x8 does not divide a 108x36 matrix" in out
    assert "0 of 5 layers sparse" in out


def test_convolutions_and_networks_for_images():
    settings = Settings(
        convs=(Conv(8, 8, 3, 6), Conv(8, 4, 1, 6, 2)), cnns=("wrn16x2",), images=2, densities=(0.25,), seconds=0.1
    )
    results = run(settings)
    by_kind = {kind: [row for row in results.rows if row.kind == kind] for kind in ("conv", "cnn")}
    assert {row.what for row in by_kind["conv"]} == {
        "conv 8x8x3x3 at 6x6, 2 images",
        "conv 8x4x1x1 at 6x6, stride 2, 2 images",
    }
    assert {row.kernels for row in by_kind["cnn"] if row.contender == "dense"} == {"torch", "torch, fused norms"}
    for found in by_kind.values():
        ours = [row for row in found if row.contender == "rarefy"]
        assert ours and all(row.speedup is not None and row.speedup_fp32 is not None and row.total_ms for row in ours)
    conv = next(row for row in by_kind["conv"] if row.contender == "rarefy")
    assert conv.flops == 6 * round(0.25 * 8 * 72) * 2 * 36 and conv.efficiency is not None
    network = next(row for row in by_kind["cnn"] if row.contender == "rarefy")
    assert network.density == pytest.approx(0.25, abs=0.01) and network.optimizer_ms is not None
    data = results.to_json()
    assert "conv 8x8x3x3" in bench_page(data) and "wrn16x2, 2 images" in bench_page(data)
    console = Console(width=140, record=True, file=io.StringIO())
    show(results, console)
    shown = console.export_text()
    assert "dense fp32 fused norms" in shown and "conv 8x8x3x3 at 6x6, 2 images" in shown


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"cnns": ("resnet19",)}, "did you mean 'resnet18'"),
        ({"convs": (Conv(8, 6, 3, 6),), "blocks": ((4, 4),)}, "divide"),
        ({"convs": (Conv(8, 8, 4, 0),)}, "has no output"),
        ({"convs": (Conv(8, 6, 3, 6, 1, 4),)}, "groups must divide"),
        ({"convs": (Conv(8, 8, 3, 6, 1, 4),), "blocks": ((4, 1),)}, "does not fit 4 groups of 2"),
        ({"convs": (Conv(8, 8, 3, 6),), "device": "cuda"}, "timed on the CPU only"),
        ({"cnns": ("resnet18",), "images": 0}, "images must be at least 1"),
    ],
)
def test_impossible_convolutions_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Settings(**changes)


def test_convolutions_on_the_command_line():
    assert conv_of("128x64x3x32/2") == Conv(128, 64, 3, 32, 2)
    assert conv_of("128x64x3x32/2g4") == Conv(128, 64, 3, 32, 2, 4) and conv_of("8x8x3x4G2") == Conv(8, 8, 3, 4, 1, 2)
    for text in ("64x64x3", "64x64x3x0", "ax64x3x32", "64x64x3x32/", "64x64x3x32/0", "64x64x3x32g", "8x8x3x4g0"):
        with pytest.raises(ValueError, match="write them like 64x64x3x32"):
            conv_of(text)


def convolutions_of(model: nn.Module, side: int) -> list[str]:
    """What may become sparse of a network on square images: convolutions of more than three channels, not depthwise."""
    found = []

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
        if conv.in_channels > 3 and conv.groups < conv.in_channels:
            sizes = f"{conv.out_channels}x{conv.in_channels}x{conv.kernel_size[0]}x{inputs[0].shape[2]}"
            stride = f"/{conv.stride[0]}" if conv.stride[0] > 1 else ""
            found.append(sizes + stride + (f"g{conv.groups}" if conv.groups > 1 else ""))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return found


class ResNeXtBlock(nn.Module):
    """1x1, 3x3 with 32 groups, 1x1, beside a skip."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = 2 * inner
        convs = [nn.Conv2d(inputs, inner, 1, bias=False), nn.Conv2d(inner, inner, 3, stride, 1, groups=32, bias=False)]
        convs.append(nn.Conv2d(inner, outputs, 1, bias=False))
        self.body = nn.Sequential(*(part for conv in convs for part in (conv, nn.BatchNorm2d(conv.out_channels))))
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return self.body(x) + self.skip(x)


def resnext50() -> nn.Module:
    """What of ResNeXt-50 (32x4d) has weights, with 1,000 classes."""
    stages, inputs = [], 64
    for inner, blocks, stride in ((128, 3, 1), (256, 4, 2), (512, 6, 2), (1024, 3, 2)):
        for block in range(blocks):
            stages.append(ResNeXtBlock(inputs, inner, stride if block == 0 else 1))
            inputs = 2 * inner
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def test_resnext50_has_its_published_number_of_parameters():
    assert sum(p.numel() for p in resnext50().parameters()) == 25_028_904  # torchvision's; the paper says 25.0M


@pytest.mark.parametrize("name", sorted(CONVS))
def test_networks_have_the_convolutions_that_bench_times(name):
    if name in CNNS:
        model, side = network(name), 32
    elif name == "resnext50":
        model, side = resnext50(), 224
    else:
        transformers = pytest.importorskip("transformers")
        config, kind, side = {
            "resnet50": (transformers.ResNetConfig(), transformers.ResNetModel, 224),
            "mobilenet": (transformers.MobileNetV1Config(), transformers.MobileNetV1Model, 224),
        }[name]
        model = kind(config)
    assert set(CONVS[name]) == set(convolutions_of(model, side))
    assert wish(Bench(shapes=(), convs=(name, CONVS[name][0]))).convs == tuple(map(conv_of, CONVS[name]))
