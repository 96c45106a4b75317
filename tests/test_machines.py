"""Descriptions of hardware that is not at hand: each is read and asked, and what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rarefy import Plan
from rarefy.cli.main import main
from rarefy.cost.descriptions import load_machine, machine_names
from rarefy.cost.hardware import DTYPE_BYTES, Machine
from rarefy.plan.elsewhere import Elsewhere

FLAT: dict[str, Any] = {
    "title": "a machine with round numbers",
    "imagined": True,
    "about": "for tests",
    "sources": {"paper": {"title": "a paper", "url": "https://example.org", "checked": "not checked"}},
    "peak_flops_per_s": {"bf16": {"value": 1e12, "source": "paper"}, "fp32": {"value": 1e11, "source": "paper"}},
    "dense_efficiency": {
        "bf16": {"value": 0.5, "source": "estimate", "where": "assumed"},
        "fp32": {"value": 1.0, "source": "paper"},
    },
    "memory_bytes_per_s": {"value": 1e15, "source": "paper"},
    "on_chip_bytes": {"value": 0, "source": "paper"},
    "structures": [
        {
            "block": 1,
            "dtype": "bf16",
            "efficiency": [
                {"density": 0.01, "value": 0.1, "source": "paper"},
                {"density": 0.1, "value": 0.2, "source": "paper"},
            ],
        },
        {"block": [4, 1], "dtype": "fp32", "efficiency": [{"density": 1.0, "value": 1.0, "source": "paper"}]},
    ],
}


def written(tmp_path, **changes) -> str:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump({**FLAT, **changes}))
    return str(path)


@pytest.mark.parametrize("name", machine_names())
def test_each_description_is_whole_and_answers(name):
    machine = load_machine(name)
    assert machine.title and machine.about and set(machine.peak_flops_per_s) <= set(DTYPE_BYTES)
    assert all(source.url.startswith("https://") and source.checked for source in machine.sources.values())
    used = {figure.source for figure in machine._figures()}
    assert used <= {*machine.sources, "estimate"} and set(machine.sources) <= used, "every source is used, none missing"
    assert machine.imagined == ("imagined" in name) == machine.title.startswith("An imagined")
    assert all(figure.where for figure in machine._figures()), "each says where in its source it is"
    for structure in machine.structures:
        sparse, dense = (
            machine.sparse_ms(structure, (4096, 1024), 2048, 0.05),
            machine.best_dense((4096, 1024), 2048)[1],
        )
        limit = machine.break_even(structure, (4096, 1024), 2048)
        assert sparse is not None and sparse > 0 and dense > 0
        assert (sparse < dense) == (limit is not None and limit > 0.05)
    assert {"h100", "ipu-bow", "wse2", "imagined-sparse-units"} <= set(machine_names())


def test_popsparse_is_given_back():
    """Where sparse was measured to win on an IPU it is predicted to, by nearly as much: arithmetic decides there."""
    ipu = load_machine("ipu-bow")
    unstructured, blocks = (
        next(s for s in ipu.structures if s.shape == b and s.dtype == "fp16") for b in ((1, 1), (16, 16))
    )
    published = {(1, 1 / 64): 1.99, (1, 1 / 32): 1.33, (1, 1 / 16): 0.828, (1, 1 / 8): 0.464}
    published |= {(16, 1 / 64): 1.55, (16, 1 / 32): 1.37, (16, 1 / 16): 1.37, (16, 1 / 8): 1.24}
    for (block, density), speedup in published.items():
        structure, tokens = (unstructured, 1024) if block == 1 else (blocks, 2048)
        sparse = ipu.sparse_ms(structure, (4096, 4096), tokens, density)
        assert sparse is not None
        assert ipu.best_dense((4096, 4096), tokens)[1] / sparse == pytest.approx(speedup, rel=0.08)


def test_times_follow_from_the_figures(tmp_path):
    machine = load_machine(written(tmp_path))
    unstructured, rows = machine.structures
    assert machine.dense_ms((100, 100), 1000, "bf16") == pytest.approx(3e3 * 2 * 1e7 / 5e11)
    assert machine.best_dense((100, 100), 1000) == ("bf16", machine.dense_ms((100, 100), 1000, "bf16"))
    assert machine.sparse_ms(unstructured, (100, 100), 1000, 0.1) == pytest.approx(3e3 * 2 * 1e6 / 2e11)
    assert unstructured.at(0.001) == 0.1 and unstructured.at(1.0) == 0.2
    assert unstructured.at(0.1**1.5) == pytest.approx(0.15)
    assert machine.break_even(unstructured, (100, 100), 1000) == pytest.approx(0.4, rel=0.03)
    assert machine.break_even(rows, (100, 100), 1000) == pytest.approx(0.2, rel=0.03)
    assert machine.sparse_ms(rows, (102, 100), 1000, 0.1) is machine.break_even(rows, (102, 100), 1000) is None


def test_traffic_and_calls_bound_what_arithmetic_does_not(tmp_path):
    slow = load_machine(written(tmp_path, memory_bytes_per_s={"value": 1e6, "source": "paper"}))
    moved = 100 * 100 * 2 + 200 * 10 * 2
    assert slow.dense_ms((100, 100), 10, "bf16") == pytest.approx(3e3 * moved / 1e6)
    near = load_machine(
        written(
            tmp_path,
            memory_bytes_per_s={"value": 1e6, "source": "paper"},
            on_chip_bytes={"value": moved, "source": "paper"},
            on_chip_bytes_per_s={"value": 1e7, "source": "paper"},
            call_s={"value": 1.0, "source": "paper"},
        )
    )
    assert near.dense_ms((100, 100), 10, "bf16") == pytest.approx(3e3 * (moved / 1e7 + 1.0))
    assert near.dense_ms((100, 100), 11, "bf16") > 3e3 * (moved / 1e6), "one token more, and it does not fit"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"titel": "x"}, "there is no 'titel'; did you mean 'title'"),
        ({"title": 3}, r"machine\.yaml\.title"),
        ({"memory_bytes_per_s": {"value": "fast", "source": "paper"}}, r"memory_bytes_per_s\.value.*'fast'"),
        ({"memory_bytes_per_s": {"value": 0, "source": "paper"}}, "must be positive"),
        ({"memory_bytes_per_s": {"value": -1, "source": "paper"}}, "not negative, got -1"),
        ({"memory_bytes_per_s": {"value": 1e9, "source": "papr"}}, "source: there is no 'papr'; did you mean 'paper'"),
        ({"memory_bytes_per_s": {"value": 1e9, "source": "estimate"}}, "an estimate needs its reason"),
        ({"peak_flops_per_s": {}}, "peak_flops_per_s is empty"),
        ({"peak_flops_per_s": {"fp33": {"value": 1, "source": "paper"}}}, "did you mean 'fp32'"),
        ({"dense_efficiency": {"bf16": {"value": 0.5, "source": "paper"}}}, "must name the same dtypes"),
        ({"structures": [{"block": 1, "dtype": "bf16", "efficiency": []}]}, r"structures\[0\].*efficiency is empty"),
        ({"structures": [{"block": 0, "dtype": "bf16"}]}, r"structures\[0\]\.efficiency: expected a list"),
        (
            {"structures": [{**FLAT["structures"][1], "dtype": "fp16"}]},
            "structures: dtype: there is no 'fp16'",
        ),
        (
            {"structures": [{**FLAT["structures"][1], "efficiency": [{"density": 2, "value": 1, "source": "paper"}]}]},
            r"efficiency\[0\].*density must lie in \(0, 1\], got 2",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_machine(written(tmp_path, **changes))
    assert "machine.yaml" in str(refused.value)


def test_files_run_no_code_and_missing_ones_are_named(tmp_path):
    evil = tmp_path / "evil.yaml"
    evil.write_text("title: !!python/object/apply:os.getcwd []\n")
    for name in (evil, tmp_path / "missing.yaml"):
        with pytest.raises(ValueError, match=r"\.yaml cannot be read as a machine description"):
            load_machine(name)
    with pytest.raises(ValueError, match="machine: there is no 'h10'; did you mean 'h100'"):
        load_machine("h10")


def test_a_plan_says_where_sparse_would_win(tmp_path):
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 62), nn.Linear(62, 8))
    plan = Plan(density=0.1, keep_dense=("2",))
    found = Elsewhere.of(load_machine(written(tmp_path)), plan, model, torch.zeros(5, 64))
    rows = found.rows
    assert [(row["name"], row["structure"]) for row in rows] == [("0", "1x1"), ("0", "4x1"), ("1", "1x1"), ("1", "4x1")]
    assert all(row["tokens"] == 5 and row["dense_dtype"] == "bf16" for row in rows)
    assert rows[0]["speedup"] == pytest.approx(4.0, rel=0.01) and rows[3]["sparse_ms"] is None
    assert (
        "does not divide" in str(found) and "imagined" in str(found) and "1 of its figures is an estimate" in str(found)
    )
    assert json.loads(json.dumps(found.to_json()))["layers"] == rows


def test_the_command_lists_machines_and_asks_one(capsys, tmp_path):
    assert main(["plan", "--machines"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in machine_names())
    tiny = ["--width", "32", "--layers", "2", "--heads", "2", "--context", "16", "--batch", "2"]
    assert main(["plan", *tiny, "--machine", written(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["title"] == FLAT["title"] and len(data["layers"]) == 2 * 4 * 2
    assert main(["plan", *tiny, "--machine", "ipu-bow"]) == 0
    assert "blocks.0.mlp.up and 1 alike" in capsys.readouterr().out
    assert main(["plan", *tiny, "--machine", "abacus"]) == 2
    assert "there is no 'abacus'" in capsys.readouterr().err


def test_a_machine_needs_no_more_than_its_figures():
    assert isinstance(load_machine("h100"), Machine) and load_machine("h100").on_chip_bytes_per_s is None
