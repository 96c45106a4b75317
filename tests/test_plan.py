"""Plans: what becomes sparse, what stays dense and why, how many units each layer gets, and what the table says."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from rarefy import SET, Constant, Cosine, Plan, RigL, SparseLinear, Static
from rarefy.cost import LayerCost
from rarefy.plan import times as timing

transformers = pytest.importorskip("transformers")


class Odd(nn.Linear):
    """A subclass may compute anything."""


def zoo() -> nn.ModuleDict:
    """One of each kind of layer that a plan meets."""
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 32),
            "narrow": nn.Linear(16, 6, bias=False),
            "conv1d": transformers.pytorch_utils.Conv1D(24, 16),
            "sparse": SparseLinear(16, 16, density=0.2),
            "embed": nn.Embedding(40, 16),
            "head": nn.Linear(16, 40, bias=False),
            "attention": nn.MultiheadAttention(16, 2),
            "encoder": nn.TransformerEncoderLayer(16, 2, dim_feedforward=24),
            "parametrized": parametrizations.weight_norm(nn.Linear(16, 8)),
            "odd": Odd(16, 8),
            "hooked": nn.Linear(16, 8),
            "lazy": nn.LazyLinear(8),
            "whole": nn.Linear(16, 8).requires_grad_(False),
            "empty": nn.Linear(0, 8),
        }
    )
    model["head"].weight = model["embed"].weight
    model["hooked"].register_forward_hook(lambda *given: None)
    model["whole"].weight = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
    return model


REASONS = {
    "head": "its weight is tied to embed.weight",
    "attention.in_proj": "nn.MultiheadAttention reads its weights itself, without calling a layer",
    "attention.out_proj": "nn.MultiheadAttention reads its weights itself, without calling a layer",
    "encoder.self_attn.in_proj": "nn.MultiheadAttention reads its weights itself, without calling a layer",
    "encoder.self_attn.out_proj": "nn.MultiheadAttention reads its weights itself, without calling a layer",
    "encoder.linear1": "nn.TransformerEncoderLayer's fused path reads its weights itself, without calling a layer",
    "encoder.linear2": "nn.TransformerEncoderLayer's fused path reads its weights itself, without calling a layer",
    "parametrized": "its weight is computed by a parametrization",
    "odd": "Odd is a subclass of nn.Linear that may compute something else",
    "hooked": "it has hooks, which a replacement would lose",
    "lazy": "LazyLinear is a subclass of nn.Linear that may compute something else",
    "whole": "its weight is torch.int8",
    "empty": "it has no weights",
}


def test_what_cannot_be_converted_is_listed_with_its_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decisions = {d.name: d for d in Plan(density=0.5).decide(zoo())}
    assert {name: d.why_dense for name, d in decisions.items() if not d.is_sparse} == REASONS
    assert [name for name, d in decisions.items() if d.is_sparse] == ["plain", "narrow", "conv1d", "sparse"]
    assert decisions["conv1d"].shape == (24, 16), "Conv1D stores (in, out)"
    assert decisions["attention.in_proj"].shape == (48, 16)
    assert decisions["sparse"].units == 51, "what is sparse already keeps its units"


def test_a_model_that_is_a_layer_says_so():
    [decision] = Plan(density=0.5).decide(nn.Linear(4, 4))
    assert decision.why_dense == "it is the model itself: put it into a module, as it is replaced in its parent"


def test_a_block_that_does_not_divide_leaves_the_layer_dense():
    decisions = {d.name: d for d in Plan(density=0.5, block=4, include=("plain", "narrow")).decide(zoo())}
    assert decisions["plain"].is_sparse and decisions["plain"].block == (4, 4)
    assert decisions["narrow"].why_dense.startswith("a block of 4x4 does not divide a 6x16 matrix")


def mlp() -> nn.Module:
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(16, 64), "down": nn.Linear(64, 16)}) for _ in range(3)
            ),
            "head": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)),
        }
    )


@pytest.mark.parametrize(
    "options, sparse",
    [
        ({}, ["blocks.*", "head.0", "head.2"]),
        ({"include": ("*.up",)}, ["blocks.?.up"]),
        ({"include": "*.down"}, ["blocks.?.down"]),
        ({"include": ("blocks.0.*", "head.0")}, ["blocks.0.*", "head.0"]),
        ({"keep_dense": ("*.up", "head.2")}, ["blocks.?.down", "head.0"]),
        ({"keep_dense": "head"}, ["blocks.*"]),
        ({"keep_dense": ("blocks.[01]",)}, ["blocks.2.*", "head.*"]),
        ({"keep_dense": ("blocks",)}, ["head.*"]),
        ({"include": ("blocks.*",), "keep_dense": ("*.up",)}, ["blocks.?.down"]),
    ],
    ids=str,
)
def test_filters(options, sparse):
    from fnmatch import filter as matching

    decisions = Plan(density=0.5, **options).decide(mlp())
    names = [d.name for d in decisions]
    wanted = {name for pattern in sparse for name in matching(names, pattern)}
    assert {d.name for d in decisions if d.is_sparse} == wanted
    assert all(d.why_dense for d in decisions if d.name not in wanted)


@pytest.mark.parametrize("option", ["include", "overrides"])
def test_a_filter_that_matches_nothing_is_refused(option):
    value: Any = ("block.*",) if option == "include" else {"block.*": 0.5}
    with pytest.raises(ValueError, match=rf"{option}: 'block.\*' matches no layer; there are: .* and 2 more"):
        Plan(density=0.5, **{option: value}).decide(mlp())


def test_a_keep_dense_that_keeps_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"keep_dense: '\*embedding\*' matches no layer, so it keeps nothing dense"):
        Plan(density=0.5, keep_dense=("*embedding*",)).decide(mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "up": nn.Linear(4, 4)})
        Plan(density=0.5, keep_dense=("*embedding*",)).decide(model)  # it is there, and dense anyway


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"could make sparse: no nn\.Linear, nn\.Conv1d, nn\.Conv2d, Conv1D"):
        Plan(density=0.5).decide(nn.Sequential(nn.ReLU()))


def test_overrides_are_outside_the_shared_budget():
    plan = Plan(density=0.1, overrides={"head.0": 0.5, "head.*": 1.0, "blocks.0.up": 1e-9})
    units = {d.name: d.units for d in plan.decide(mlp())}
    assert units["head.0"] == 128 and units["head.2"] == 160, "the first that matches counts"
    assert units["blocks.0.up"] == 1
    shared = [units[f"blocks.{i}.{part}"] for i, part in ((0, "down"), (1, "up"), (1, "down"), (2, "up"), (2, "down"))]
    assert sum(u or 0 for u in shared) == round(0.1 * 5 * 1024)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    st.floats(0.001, 1),
    st.sampled_from(["uniform", "er", "erk"]),
    st.sampled_from([1, 2, (4, 1)]),
    st.data(),
)
def test_counts_are_exact_on_any_model(shapes, density, distribution, block, data):
    rows, cols = (block, block) if isinstance(block, int) else block
    layers = [nn.Linear(i * cols, o * rows, device="meta") for o, i in shapes]
    adopted = data.draw(st.booleans())
    model = nn.Sequential(*layers, *([SparseLinear(6, 4, density=0.5, device="meta")] if adopted else []))
    decisions = Plan(density=density, distribution=distribution, block=block).decide(model)
    counts = [d.units or 0 for d in decisions[: len(shapes)]]
    sizes = [o * i for o, i in shapes]
    assert sum(counts) == round(density * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert not adopted or decisions[-1].units == 12


# -- the table --


def test_explain_adds_up():
    plan = Plan(density=0.25, distribution="erk", keep_dense=("head.2",), block=4)
    explanation = plan.explain(mlp())
    rows, totals = explanation.rows, explanation.totals
    for key in ("nnz", "bytes", "dense_bytes", "flops", "dense_flops"):
        assert totals[key] == sum(row[key] for row in rows)
    for row in rows:
        out, inputs = row["shape"]
        assert row["dense_bytes"] == 4 * out * inputs and row["flops"] == 6 * row["nnz"]
        assert row["dense_flops"] == 6 * out * inputs
        if row["kind"] == "sparse":
            assert row["nnz"] == 16 * row["units"] and row["density"] == row["nnz"] / (out * inputs)
            indices = row["units"] * (2 + 2 + 4) + 4 * (out // 4 + 1 + inputs // 4 + 1)
            assert row["bytes"] == 4 * row["nnz"] + indices
        else:
            assert (row["nnz"], row["bytes"], row["density"]) == (out * inputs, 4 * out * inputs, 1.0)
    sparse = [row for row in rows if row["kind"] == "sparse"]
    size = sum(row["shape"][0] * row["shape"][1] for row in sparse)
    assert totals["density"] == sum(row["nnz"] for row in sparse) / size
    assert (totals["asked_density"], totals["sparse_layers"], totals["layers"]) == (0.25, 7, 8)


def test_the_bytes_are_what_the_layers_hold():
    model = mlp()
    plan = Plan(density=0.25, block=4, keep_dense=("head",))
    explanation = plan.explain(model)
    from rarefy import sparsify

    layers = sparsify(model, plan).layers
    for row in explanation.rows:
        if row["kind"] == "sparse":
            layer = layers[row["name"]]
            assert row["bytes"] == layer.values.numel() * 4 + layer.index_bytes()


def test_the_table_is_text_and_json():
    explanation = Plan(density=0.25, keep_dense=("head.2",)).explain(mlp())
    text = str(explanation)
    for name in ("blocks.0.up", "head.0", "all"):
        assert any(line.startswith(name) for line in text.splitlines())
    assert "head.2: dense, kept dense as asked (keep_dense 'head.2')" in text
    assert "7 of 8 layers sparse, density 0.2500 (asked 0.25)" in text
    assert "speed" in text.splitlines()[0]
    data = json.loads(json.dumps(explanation.to_json()))
    assert data["layers"] == explanation.rows and data["totals"]["layers"] == 8


def test_what_would_be_slower_stays_dense_with_the_figures(monkeypatch):
    """And leaves the budget: the others' counts are made anew, and timed anew."""
    asked = []

    def measure(shape, units, block, tokens, *, bias, precisions=False):
        asked.append((shape, units, tokens))
        if units is None:
            return LayerCost(None, 0.5)
        return LayerCost(sparse_ms=3.0 if shape == (16, 64) else 1.0, dense_ms=2.0)

    monkeypatch.setattr(timing, "measure", measure)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.head(self.down(self.up(x)))

    plan = Plan(density=0.1, keep_dense=("head",))
    decisions = {d.name: d for d in plan.decide(Model(), torch.randn(5, 7, 16))}
    assert decisions["up"].is_sparse and decisions["up"].units == round(0.1 * 1024) and decisions["up"].tokens == 35
    assert decisions["down"].why_dense == (
        "sparse would be slower here: 3.00 ms against 2.00 ms dense, at density 0.0996 and 35 tokens"
    )
    assert decisions["up"].speedup == 2.0 and decisions["head"].speedup is None
    rows = {row["name"]: row for row in plan.explain(Model(), torch.randn(5, 7, 16)).rows}
    assert (rows["head"]["sparse_ms"], rows["head"]["dense_ms"], rows["down"]["kind"]) == (None, 0.5, "dense")
    assert {tokens for _, _, tokens in asked} == {35}


def test_explaining_changes_nothing():
    model = mlp().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    Plan(density=0.3, distribution="erk").explain(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- as data --

PLANS = [
    Plan(density=0.1),
    Plan(density=1, method=Static(), block=4, init="balanced", rescale=False, seed=7),
    Plan(
        density=0.25,
        method=RigL(interval=7, fraction=Cosine(start=0.5, stop=0.1), begin=3, end=90, stagger=False, may_return=True),
        distribution="erk",
        block=(4, 1),
        include=("a.*", "b"),
        keep_dense=("*.c",),
        overrides={"a.1": 0.5},
    ),
    Plan(density=0.05, method=SET(fraction=Constant(0.2))),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: type(p.method).__name__)
def test_round_trip(plan, tmp_path):
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml())
    assert Plan.from_yaml(file) == plan


def test_a_short_file_is_enough(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("density: 0.1\nmethod: rigl\nblock: [4, 1]\nkeep_dense: ['*head*']\n")
    assert Plan.from_yaml(file) == Plan(density=0.1, method=RigL(), block=(4, 1), keep_dense=("*head*",))


def test_a_number_is_a_constant_schedule():
    plan = Plan.from_dict({"density": 0.1, "method": {"name": "set", "fraction": 0.3}})
    assert plan.method == SET(fraction=Constant(0.3))


@pytest.mark.parametrize(
    "data, message",
    [
        ({"densty": 0.1}, "plan: there is no 'densty'; did you mean 'density'?"),
        ({"density": 0.1, "distributon": "erk"}, "did you mean 'distribution'?"),
        ({"density": 0.1, "method": {"name": "rgil"}}, "plan.method: method: there is no 'rgil'; did you mean 'rigl'?"),
        ({"density": 0.1, "method": {"name": "rigl", "intervall": 3}}, "no 'intervall'; did you mean 'interval'?"),
        ({"density": 0.1, "method": {"name": "rigl", "interval": "often"}}, "plan.method.interval: .* got 'often'"),
        ({"density": 0.1, "method": {"name": "rigl", "interval": 0}}, "interval must be at least 1 step, got 0"),
        ({"density": 0.1, "method": {"name": "set", "fraction": "cosin"}}, "no 'cosin'; did you mean 'cosine'?"),
        (
            {"density": 0.1, "method": {"name": "set", "fraction": [0.3]}},
            "expected the name of a schedule, or its name",
        ),
        ({"density": 0.1, "method": 3}, "expected the name of a method, or its name and fields, got 3"),
        ({"density": "much"}, "plan.density: .* got 'much'"),
        ({"density": 0.1, "distribution": "earl"}, "plan.distribution: .* got 'earl'"),
        ({"density": 0.1, "init": "magnitud"}, "plan.init: .* got 'magnitud'"),
        ({"density": 0.1, "block": 0}, "block must be a positive int or a pair"),
        ({"density": 0.1, "overrides": {"a": 2.0}}, r"density must lie in \(0, 1\], got 2.0"),
        ({"density": 0}, r"density must lie in \(0, 1\], got 0"),
        ({}, "density"),
        (["density"], "expected fields of Plan, got"),
    ],
    ids=str,
)
def test_bad_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"density": 0.1, "distribution": "ERK"}, "distribution: there is no 'ERK'"),
        ({"density": 0.1, "init": "randon"}, "init: there is no 'randon'; did you mean 'random'?"),
        ({"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
        ({"density": 0.1, "block": (4, 0)}, "block must be a positive int or a pair"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


@pytest.mark.parametrize("text", ["density: [", "- 1\n- 2\n", "density: 0.1\nnonsense: 2\n", "\x00"])
def test_a_bad_file_is_named(text, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.yaml"):
        Plan.from_yaml(file)
    with pytest.raises(ValueError, match=r"missing\.yaml cannot be read as a plan"):
        Plan.from_yaml(tmp_path / "missing.yaml")


def test_yaml_runs_no_code(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("density: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="cannot be read as a plan"):
        Plan.from_yaml(file)


def test_a_plan_does_not_change():
    overrides = {"a": 0.5}
    plan = Plan(density=0.1, overrides=overrides)
    overrides["a"] = 0.9
    assert plan.overrides == {"a": 0.5}
    with pytest.raises(AttributeError):
        plan.density = 0.2  # type: ignore[misc]
