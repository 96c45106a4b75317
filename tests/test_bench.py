"""The bench: what it times, what it concludes, and what it prints. No test asserts a speed."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch
from rich.console import Console
from torch import nn

from rarefy.bench import Check, Results, Row, Spread, break_even, installed, run
from rarefy.cli import bench as command
from rarefy.cli.main import main
from rarefy.ops import backend
from rarefy.pattern import Pattern

SMALL = {"shapes": [(16, 24)], "densities": [0.25, 0.5], "blocks": [(1, 1), (4, 4)], "tokens": 8, "seconds": 0.1}
FLAGS = ["--shapes", "16x24", "--densities", "0.25", "--blocks", "1", "--tokens", "8", "--seconds", "0.1"]


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
    found = break_even((8, 8), (1, 1), points)
    assert found.density == (None if density is None else pytest.approx(density))
    assert (found.faster_at, found.slower_at) == (faster_at, slower_at)


@pytest.mark.parametrize("last, disturbed", [(1.09, False), (1.11, True), (1 / 1.09, False), (1 / 1.11, True)])
def test_check_notices_a_machine_that_got_slower_or_faster(last, disturbed):
    check = Check(1.0, last)
    assert check.moved == pytest.approx(max(last, 1 / last) - 1)
    assert check.disturbed is disturbed


def test_efficiency_is_dense_time_times_density_over_sparse_time():
    row = our_row(density=0.1, speedup=5.0)
    assert row.efficiency == pytest.approx(0.5)
    assert our_row(density=0.1, speedup=None).efficiency is None


def our_row(*, density: float, speedup: float | None) -> Row:
    spread = None if speedup is None else Spread(speedup, speedup, speedup)
    return Row(
        shape=(8, 8), contender="rarefy", kernels="avx2", density=density, block=(1, 1), rounds=3, speedup=spread
    )


def test_break_evens_are_of_our_rows_only():
    peer = Row(
        shape=(8, 8), contender="other", kernels="x", density=0.9, block=(1, 1), rounds=3, speedup=Spread(9, 9, 9)
    )
    rows = [our_row(density=0.1, speedup=2.0), our_row(density=0.5, speedup=2 / 3), peer]
    results = Results(machine={}, settings={}, rows=rows, check=Check(1, 1), seconds=1)
    (found,) = results.break_evens
    assert found.density == pytest.approx(0.3)


# -- what is timed ----------------------------------------------------------------------------------------------------


def test_run_has_a_row_for_every_shape_density_and_block():
    results = run(**SMALL, with_peers=False)

    assert [(row.contender, row.density, row.block) for row in results.rows] == [
        ("dense", 1.0, (1, 1)),
        *(("rarefy", d, b) for b in [(1, 1), (4, 4)] for d in [0.25, 0.5]),
    ]
    dense, *ours = results.rows
    for row in ours:
        assert row.rounds == dense.rounds >= 3
        for spread in (
            row.forward_ms,
            row.dx_ms,
            row.dw_ms,
            row.total_ms,
            row.speedup,
        ):
            assert spread is not None and 0 < spread.q1 <= spread.median <= spread.q3
        assert row.dense_ms == dense.total_ms  # the same rounds
        for spread in (row.growth_ms, row.growth_ratio):
            assert (spread is not None) == (row.density == 0.5)  # the middle one of the densities
    assert {"cpu", "isa", "threads", "torch", "rarefy", "date"} <= results.machine.keys()
    assert len(results.break_evens) == 2


def test_the_laps_compute_what_they_are_named_after():
    from rarefy.bench.timing import _dense, _sparse
    from rarefy.cost import dense_layer, random_batch

    generator = torch.Generator().manual_seed(0)
    x, dy = random_batch((16, 24), 8, generator)
    pattern = Pattern.random((16, 24), 0.25, 4, generator)
    exact = dy.T @ x.detach()

    layer = dense_layer((16, 24))
    _, _, dx, dw = _dense(layer, x, dy)
    torch.testing.assert_close(dx(), dy @ layer.weight.detach())
    torch.testing.assert_close(dw(), exact)

    forward, back, dx, dw, growth = _sparse(pattern, x, dy, generator, with_growth=True).laps
    forward()
    back()
    assert x.grad is not None
    torch.testing.assert_close(dx(), x.grad)
    blocks = exact.view(4, 4, 6, 4).transpose(1, 2).reshape(24, 4, 4)
    torch.testing.assert_close(dw(), blocks[pattern.unit_indices()])
    found = growth()
    assert isinstance(found, tuple)
    units, scores = found
    assert len(units) == 2  # 30% of the 6 that exist
    assert not set(units.tolist()) & set(pattern.unit_indices().tolist())
    torch.testing.assert_close(scores, blocks.abs().mean(dim=(1, 2))[units])


def test_threads_and_backend_are_set_while_timing_and_set_back():
    threads = torch.get_num_threads()
    results = run(**{**SMALL, "blocks": [(1, 1)]}, threads=threads + 1, isa="tiled", with_peers=False)

    assert results.machine["threads"] == threads + 1
    assert {row.kernels for row in results.rows if row.contender == "rarefy"} == {"tiled"}
    assert torch.get_num_threads() == threads
    assert backend._named == "auto"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shapes": []}, "shapes is empty"),
        ({"densities": []}, "densities is empty"),
        ({"densities": [0.0]}, "density must lie in"),
        ({"blocks": [(5, 5)]}, "5x5 does not divide a 16x24"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"isa": "sse"}, "'sse' is not available here; there are: reference, tiled"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_before_timing(monkeypatch, change, message):
    monkeypatch.setattr("rarefy.bench.timing.interleaved", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ValueError, match=message):
        run(**{**SMALL, **change})


# -- peers ------------------------------------------------------------------------------------------------------------


class FakeSparseLinear(nn.Module):
    """As SparseLab's: a random pattern of its own, with a slot of padding."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, sparsity: float = 0.9) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.density = 1 - sparsity - 0.01
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


@pytest.fixture
def fake_sparselab(monkeypatch):
    module = types.ModuleType("sparselab")
    module.__dict__.update(SparseLinear=FakeSparseLinear, __version__="0.0.1")
    monkeypatch.setitem(sys.modules, "sparselab", module)


@pytest.fixture
def no_sparselab(monkeypatch):
    monkeypatch.delitem(sys.modules, "sparselab", raising=False)
    monkeypatch.setattr("rarefy.bench.peers.find_spec", lambda name: None)


def test_sparselab_is_timed_forward_and_backward_after_everything_else(fake_sparselab):
    results = run(**SMALL)

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
    row = run(**{**SMALL, "densities": [0.5]}).rows[-1]
    assert row.total_ms is not None
    assert row.contender.startswith("SparseLab") and row.total_ms.q1 < 100


def test_without_sparselab_only_torch_is_beside_us(no_sparselab):
    notes: list[str] = []
    assert [peer.name for peer in installed(2, notes)] == ["torch CSR"]
    assert notes == []


def test_a_peer_that_cannot_be_imported_is_noted(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "sparselab", raising=False)
    (tmp_path / "sparselab.py").write_text("raise ImportError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    notes: list[str] = []
    assert [peer.name for peer in installed(2, notes)] == ["torch CSR"]
    assert notes == ["SparseLab is installed, but cannot be imported: built for another torch"]


@pytest.mark.parametrize("before", [None, "7"])
def test_a_peer_is_told_the_threads_while_it_loads(monkeypatch, tmp_path, before):
    monkeypatch.delitem(sys.modules, "sparselab", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    (tmp_path / "sparselab.py").write_text("import os\n__version__ = os.environ['OMP_NUM_THREADS']")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert installed(3, [])[-1].name == "SparseLab 3"
        assert os.environ.get("OMP_NUM_THREADS") == before
    finally:
        sys.modules.pop("sparselab", None)


def test_torch_csr_is_a_forward_and_right(no_sparselab):
    (peer,) = installed(1, [])
    pattern = Pattern.random((6, 9), 0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 9)
    entry = peer.enter(pattern, x, torch.randn(4, 6))
    (forward,) = entry.laps

    values = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(6, 9)
    weight[pattern.to_mask()] = values
    torch.testing.assert_close(forward(), x @ weight.T)
    assert entry.density == pattern.density and not entry.has_backward


# -- the command ------------------------------------------------------------------------------------------------------


def test_json_on_stdout_is_json_and_nothing_else(capsys, tmp_path, no_sparselab):
    assert main(["bench", *FLAGS, "--json", "--out", str(tmp_path / "bench.json")]) == 0

    out = capsys.readouterr().out
    data = json.loads(out)
    assert (tmp_path / "bench.json").read_text() == out
    assert [row["contender"] for row in data["rows"]] == ["dense", "rarefy", "torch CSR"]
    ours = data["rows"][1]
    assert ours["efficiency"] == pytest.approx(ours["speedup"]["median"] * ours["density"])
    assert data["settings"]["shapes"] == [[16, 24]]
    assert data["check"].keys() == {"first_ms", "last_ms", "moved", "disturbed"}
    assert [found["block"] for found in data["break_even"]] == [[1, 1]]


def test_a_table_says_machine_shapes_and_how_to_read_it(capsys, no_sparselab):
    assert main(["bench", *FLAGS]) == 0
    out = capsys.readouterr().out
    for said in (
        torch.__version__,
        "threads",
        "16x24",
        "rarefy 1x1",
        "torch CSR",
        "efficiency",
        "break-even",
        "8 tokens",
    ):
        assert said in out


def test_a_disturbed_machine_is_told(capsys, monkeypatch, no_sparselab):
    readings = iter([10.0, 13.0])
    monkeypatch.setattr("rarefy.bench.timing._reference_ms", lambda tokens: next(readings))
    assert main(["bench", *FLAGS, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["check"]["disturbed"] is True
    assert "30% apart" in printed.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shapes", "512"], "shapes: '512' is none; write them like 4096x1024"),
        (["--shapes", "512xtall"], "shapes: '512xtall'"),
        (["--blocks", "0"], "blocks: 0 is none; write them like 4 or 4x1"),
        (["--densities", "20"], "density must lie in (0, 1], got 20.0"),
        (["--isa", "mmx"], "'mmx' is not available here"),
        (["--blocks", "3"], "3x3 does not divide"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, flags, message):
    assert main(["bench", *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_yaml_file_says_the_same_and_flags_override_it(capsys, tmp_path, no_sparselab):
    file = tmp_path / "bench.yaml"
    file.write_text("shapes: [16x24]\nblocks: [1, 4x1]\ndensities: [0.5]\ntokens: 8\nseconds: 0.1\npeers: false\n")
    assert main(["bench", "--config", str(file), "--tokens", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"]["blocks"] == [[1, 1], [4, 1]]
    assert data["settings"]["tokens"] == 4


@pytest.mark.parametrize(
    "speedups, said",
    [
        ({0.1: 2.0, 0.5: 2 / 3}, ["~0.3", "interpolated: 0.1 faster, 0.5 slower"]),
        ({0.1: 2.0}, ["-", "faster at all, up to 0.1"]),
        ({0.1: 0.5}, ["-", "slower at all, from 0.1"]),
    ],
)
def test_break_even_table_says_how_it_knows(speedups, said):
    rows = [our_row(density=density, speedup=speedup) for density, speedup in speedups.items()]
    results = Results(machine={}, settings={}, rows=rows, check=Check(1, 1), seconds=1)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(command._break_evens(results))
    line = console.export_text().splitlines()[1]
    assert all(part in line for part in said)


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
