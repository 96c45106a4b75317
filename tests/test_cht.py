"""CHT and CHTs: hand-worked scores, and the formula written out path by path on random graphs."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy import CHT, SET, CHTs, Constant, LayerView, Linear, Pattern, Plan, RigL, SparseLinear, sparsify
from rarefy.methods import cht
from rarefy.methods.topology import TILE_ENTRIES, _by_products, grid_of, link_scores
from rewires import check_nothing_changed, check_rewire, engine, layer_of, snapshot, step, units_of, values_of


def plain_scores(mask: np.ndarray, rule: str) -> np.ndarray:
    """The formula for every absent link, by walking its three-step paths; NaN where a link exists."""
    rows, cols = mask.shape
    scores = np.full(mask.shape, np.nan)
    for i, t in itertools.product(range(rows), range(cols)):
        if mask[i, t]:
            continue
        paths = [(s, j) for s in range(cols) for j in range(rows) if mask[i, s] and mask[j, s] and mask[j, t]]
        on_paths = [mask[:, s] for s in {s for s, _ in paths}]
        others = [{j for j in range(rows) if mask[j, t]} for _ in on_paths]
        on_paths += [mask[j] for j in {j for _, j in paths}]
        others += [{s for s in range(cols) if mask[i, s]} for _ in range(len(on_paths) - len(others))]
        total = 0.0
        for links, local in zip(on_paths, others, strict=True):
            inside = sum(bool(links[node]) for node in local)
            outside = int(links.sum()) - inside - 1  # the one to i or t is neither
            total += ((1 + inside) if rule == "ch2" else 1) / (1 + outside)
        scores[i, t] = total
    return scores


def our_scores(pattern: Pattern, rule, tile_entries: int) -> np.ndarray:
    rows, cols = pattern.num_unit_rows, pattern.num_unit_cols
    grid = grid_of(pattern.unit_indices(), rows, cols)
    tiles = list(link_scores(grid, rule, tile_entries))
    assert [tile.first for tile in tiles] == list(itertools.accumulate([0, *(len(t.scores) for t in tiles[:-1])]))
    lines = torch.cat([tile.scores for tile in tiles])
    return (lines if grid.turned else lines.T).numpy()


@st.composite
def patterns(draw) -> Pattern:
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    return Pattern.with_units((rows, cols), draw(st.integers(0, rows * cols)), 1, generator)


@settings(max_examples=150)
@given(patterns(), st.sampled_from(["ch2", "ch3"]), st.integers(1, 30))
def test_scores_are_the_formula(pattern, rule, tile_entries):
    """Whole and in tiles, both ways up. float32 sums, then 17 bits: relative error below 2 ** -16."""
    wanted = plain_scores(pattern.to_mask().numpy(), rule)
    found = our_scores(pattern, rule, tile_entries)
    absent = ~np.isnan(wanted)
    np.testing.assert_allclose(found[absent], wanted[absent], rtol=2**-16)


@pytest.mark.parametrize("rule", ["ch2", "ch3"])
@pytest.mark.parametrize("shape", [(150, 70), (70, 150), (37, 37), (3, 300), (430, 230)], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_and_products_give_the_same_scores(rule, shape, density, threads):
    """Whole vectors and what is left over, few lines and many. The same bits where there are many; where there are few,
    products sum in another order, and two scores may be one step of 17 bits apart.
    """
    pattern = Pattern.random(shape, density, generator=torch.Generator().manual_seed(0))
    grid = grid_of(pattern.unit_indices(), *shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kernels = torch.cat([tile.scores for tile in link_scores(grid, rule)])
    finally:
        torch.set_num_threads(before)

    products = torch.cat([tile.scores for tile in _by_products(grid, rule, TILE_ENTRIES)])

    if min(shape) > 200:
        assert torch.equal(kernels, products)
    np.testing.assert_allclose(kernels.numpy(), products.numpy(), rtol=2**-16)


def test_scores_by_hand():
    """Rows 0 and 1 share column 0; the link of row 0 to column 1 is on one path, 0 - (0) - 1 - (1)."""
    pattern = Pattern.from_units(torch.tensor([0, 3, 4, 5]), (2, 3))  # row 0: column 0; row 1: columns 0, 1, 2
    # Column 0: inside 1 (row 1), outside 0. Row 1: inside 1 (column 0), outside 1 (column 2), beside its link to 1.
    assert our_scores(pattern, "ch2", 100)[0, 1] == 2 / 1 + 2 / 2
    assert our_scores(pattern, "ch3", 100)[0, 1] == 1 / 1 + 1 / 2


def test_a_users_precision_does_not_change_scores():
    pattern = Pattern.random((40, 64), 0.2, generator=torch.Generator().manual_seed(0))
    exact = our_scores(pattern, "ch2", 1000)
    torch.set_float32_matmul_precision("medium")
    try:
        assert np.array_equal(our_scores(pattern, "ch2", 1000), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# -- one rewire --


def view_of(layer: SparseLinear, **more) -> LayerView:
    return LayerView(name="layer", pattern=layer.pattern, values=layer.values.detach(), step=3, **more)


def rewire(layer: SparseLinear, method: CHT, *, seed: int = 0, others: dict[str, SparseLinear] | None = None):
    layers = {"layer": layer, **(others or {})}
    for other in (others or {}).values():
        other.values.requires_grad_(False)
    rewirer, optimizer = engine(layers, dataclasses.replace(method, interval=1, end=1), seed=seed)
    layer.values.grad = torch.zeros_like(layer.values)
    before = snapshot(layer, optimizer)
    step(optimizer)
    return rewirer, check_rewire(before, layer, optimizer)


#         row 0: 0, 1; row 1: 5, 6; row 2: 8, 10 (of 4 columns)
ACTIVE = {0: 1.0, 1: 3.0, 5: 0.5, 6: 2.0, 8: 4.0, 10: 1.0}


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 3)], ids=str)
def test_cht_by_hand(block):
    layer = layer_of(ACTIVE, (3, 4), block)
    _, (gone, born) = rewire(layer, CHT(fraction=Constant(0.34)))
    # 5 and 0 are the smallest. Left: 0 - 1, 1 - 2, 2 - 0, 2 - 2 as row - column. One path is for 1 - 0 (unit 4), none
    # for others: the second is the lowest absent unit, 0, which was just removed and returns with its value.
    assert (gone, born) == ([5], [4])
    assert values_of(layer) == {**{u: v for u, v in ACTIVE.items() if u != 5}, 4: 0.0}


def test_removed_links_may_be_kept_out():
    layer = layer_of(ACTIVE, (3, 4))
    _, (gone, born) = rewire(layer, CHT(fraction=Constant(0.34), may_return=False))
    assert (gone, born) == ([0, 5], [2, 4])


def test_relative_importance_by_hand():
    """|w| over its row and over its column: a small link of a poor neuron outlives a larger one of a rich one."""
    layer = layer_of({0: 8.0, 1: 2.0, 5: 1.0}, (2, 4))  # row sums 10 and 1, column sums 8, 3
    score = CHT(removal="importance").drop_score(view_of(layer))
    torch.testing.assert_close(score, torch.tensor([8 / 10 + 1, 2 / 10 + 2 / 3, 1 + 1 / 3]).double())
    assert CHT().drop_score(view_of(layer)).tolist() == [8, 2, 1]
    silent = layer_of({0: 0.0, 5: 0.0}, (2, 4))
    assert CHT(removal="importance").drop_score(view_of(silent)).tolist() == [0, 0]


@settings(max_examples=150)
@given(patterns(), st.sampled_from(["ch2", "ch3"]), st.booleans(), st.integers(0, 2**30))
def test_cht_is_the_plain_rule(pattern, rule, may_return, draw):
    """Removal by magnitude and growth by the formula on what is left, equal scores by lower unit."""
    if not pattern.num_units:
        return
    layer = SparseLinear.from_pattern(pattern)
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        layer.values.copy_(torch.randint(-3, 4, layer.values.shape, generator=generator))
    active, cols = values_of(layer), pattern.num_unit_cols
    n = pattern.num_unit_rows * cols
    k = min(int(0.4 * len(active) + 0.5), n - len(active))
    if not k:
        return
    removed = sorted(active, key=lambda u: (abs(active[u]), u))[:k]
    left = Pattern.from_units(torch.tensor([u for u in active if u not in removed]), pattern.shape)
    scores = plain_scores(left.to_mask().numpy(), rule).flatten()
    out = set(active) - (set(removed) if may_return else set())
    grown = sorted(set(range(n)) - out, key=lambda u: (-round(scores[u], 4), u))[:k]
    rewire(layer, CHT(fraction=Constant(0.4), rule=rule, may_return=may_return))
    assert set(units_of(layer)) == set(active) - set(removed) | set(grown)


def test_ties_do_not_depend_on_tiles(monkeypatch):
    """A checkerboard has a handful of different scores; tiles of one line choose as one of all lines does."""
    mask = (torch.arange(24)[:, None] // 2 + torch.arange(36) // 3) % 3 == 0
    results = {}
    for method in (CHT(fraction=Constant(0.3)), CHTs(fraction=Constant(0.3))):
        for entries in (1, 100, 1 << 22):
            for way_up in (mask, mask.T):
                layer = SparseLinear.from_pattern(Pattern.from_mask(way_up), generator=torch.Generator().manual_seed(0))
                monkeypatch.setattr(link_scores, "__defaults__", (entries,))
                rewire(layer, method)
                key = (type(method), way_up.shape)
                assert results.setdefault(key, units_of(layer)) == units_of(layer)


@pytest.mark.parametrize("method", [CHT(fraction=Constant(0.1)), CHTs(fraction=Constant(0.1))], ids=["cht", "chts"])
@pytest.mark.parametrize("striped", [False, True])
def test_the_bound_leaves_out_nobody(method, striped, monkeypatch):
    """On a layer large enough to have a bound the choice is the one without; striped, most scores tie."""
    if striped:
        mask = (torch.arange(160)[:, None] // 8 + torch.arange(200) // 10) % 20 == 0
    else:
        mask = torch.rand(160, 200, generator=torch.Generator().manual_seed(1)) < 0.05
    chosen, bounds = [], []
    for bound in (cht._bound, lambda scores, k: -torch.inf):
        monkeypatch.setattr(cht, "_bound", lambda scores, k, bound=bound: bounds.append(bound(scores, k)) or bounds[-1])
        layer = SparseLinear.from_pattern(Pattern.from_mask(mask), generator=torch.Generator().manual_seed(0))
        rewire(layer, method)
        chosen.append(units_of(layer))
    assert chosen[0] == chosen[1]
    assert striped or max(bounds) > 0  # there was one


# -- CHTs --


def test_chts_samples_by_weight_and_score():
    """Frequencies over seeds: a link stays in proportion to its weight to the power T, and grows by its score."""
    stayed: dict[int, int] = dict.fromkeys(ACTIVE, 0)
    born: dict[int, int] = {}
    for seed in range(600):
        layer = layer_of({0: 1.0, 1: 3.0}, (2, 4))
        method = CHTs(temperature=Constant(2.0))
        view = dataclasses.replace(view_of(layer), seed=seed)
        [gone] = method.to_remove(method.drop_score(view), 1, view).tolist()
        stayed[gone] += 1
        layer = layer_of({0: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 9: 1.0}, (3, 4))
        view = dataclasses.replace(view_of(layer), seed=seed)
        [unit] = method._predicted(view, layer.pattern.unit_indices(), 1).tolist()
        born[unit] = born.get(unit, 0) + 1
    assert abs(stayed[0] / 600 - 9 / 10) < 5 * (0.9 * 0.1 / 600) ** 0.5
    scores = np.nan_to_num(plain_scores(layer.pattern.to_mask().numpy(), "ch2")).flatten()
    for unit, score in enumerate(scores / scores.sum()):
        assert abs(born.get(unit, 0) / 600 - score) <= 5 * (score * (1 - score) / 600) ** 0.5


def test_chts_without_any_path_grows_uniformly():
    counts = torch.zeros(16)
    for seed in range(600):
        layer = layer_of({0: 1.0}, (4, 4))
        _, (gone, born) = rewire(layer, CHTs(fraction=Constant(1.0), may_return=False), seed=seed)
        assert gone == [0]
        counts[born] += 1
    assert counts[0] == 0 and (counts[1:] - 40).abs().max() < 5 * 40**0.5


def test_chts_hardens_with_temperature():
    layer = layer_of({u: 1.0 + u for u in range(20)}, (4, 10))
    lost = []
    for power in (0.0, 1.0, 9.0, 200.0):
        method = CHTs(temperature=Constant(power))
        views = [dataclasses.replace(view_of(layer), seed=seed) for seed in range(40)]
        lost.append(np.mean([method.to_remove(method.drop_score(v), 10, v).double().mean() for v in views]))
    assert lost[0] > lost[1] > lost[2] > lost[3] == pytest.approx(4.5, abs=0.2)


def test_draws_are_keyed_by_seed_step_and_name():
    layer = SparseLinear(12, 8, density=0.3, generator=torch.Generator().manual_seed(0))
    view, method = view_of(layer), CHTs()

    def chosen(**more) -> tuple[list[int], list[int]]:
        choice = method.choose(dataclasses.replace(view, **more), 9, None)  # type: ignore[arg-type]
        assert choice is not None
        return choice.drop.tolist(), choice.grow.tolist()

    assert chosen() == chosen()
    for change in ({"seed": 1}, {"step": 4}, {"name": "other"}):
        assert chosen(**change)[0] != chosen()[0] and chosen(**change)[1] != chosen()[1]


# -- chains and settling --


def test_chain_removal_takes_links_without_a_way_in_or_out():
    layer = layer_of(ACTIVE, (3, 4))
    up = layer_of({0: 1.0, 3: 1.0, 4: 1.0}, (4, 2))  # its neurons 0, 1, 2 have inputs, 3 has none
    down = layer_of({1: 1.0, 2: 1.0}, (1, 3))  # reads neurons 1 and 2, not 0
    method = CHT(fraction=Constant(0.17), chains=(("up", "layer", "down"),))
    rewirer, _ = rewire(layer, method, others={"up": up, "down": down})
    useless = method._useless(rewirer._view("layer", 1))
    layer = layer_of(ACTIVE, (3, 4))
    rewirer, _ = engine({"layer": layer, "up": up, "down": down}, dataclasses.replace(method, end=9))
    useless = method._useless(rewirer._view("layer", 1))
    assert layer.pattern.unit_indices()[useless].tolist() == [0, 1]
    choice = method.choose(rewirer._view("layer", 1), 1, None)  # type: ignore[arg-type]
    assert choice is not None
    assert layer.pattern.unit_indices()[choice.drop].tolist() == [0, 1, 5] and choice.grow.numel() == 3


def test_chain_removal_leaves_room_where_links_may_not_return():
    layer = layer_of({u: 1.0 for u in range(11)}, (3, 4))  # all but one
    down = layer_of({0: 1.0}, (1, 3))
    method = CHT(fraction=Constant(0.1), chains=(("layer", "down"),), may_return=False)
    _, (gone, born) = rewire(layer, method, others={"down": down})
    assert (gone, born) == ([0], [11])


def test_chains_match_names():
    model = nn.ModuleDict({f"b{i}": nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for i in range(2)})
    method = CHT(chains=(("*.up", "*.down"),), end=9)
    rewirer = sparsify(model, Plan(density=0.5, method=method))
    for name in ("b0.up", "b1.down"):
        assert method._useless(rewirer._view(name, 1)).dtype == torch.bool
    seen: list[str] = []
    watching = dataclasses.replace(rewirer._view("b1.down", 1), pattern_of=lambda n: seen.append(n))
    method._useless(watching)
    assert seen == ["b1.up", ""]
    wrong = CHT(chains=(("*.down", "*.down"),))
    with pytest.raises(ValueError, match=r"chains: b0.down does not follow b0.down, which has 4 outputs for its 8"):
        wrong._useless(rewirer._view("b0.down", 1))


def test_rule_4_4_a_settled_layer_rewires_no_more_and_resumes_so():
    def train(stop: float | None):
        torch.manual_seed(0)
        layer = SparseLinear(12, 8, density=0.4, generator=torch.Generator().manual_seed(0))
        method = CHT(fraction=Constant(0.3), interval=1, end=9, stop_overlap=stop)
        rewirer, optimizer = engine(layer, method)
        for _ in range(6):
            layer.values.grad = torch.zeros_like(layer.values)
            step(optimizer)
        return rewirer, layer, optimizer

    never, _, _ = train(None)
    assert len(never.history) == 6
    rewirer, layer, optimizer = train(1e-9)  # one that returns is enough
    assert 1 <= len(rewirer.history) < 6 and rewirer.due(7) == []
    again, _ = engine(layer, rewirer.method)
    again.load_state_dict(rewirer.state_dict())
    assert again.due(7) == [] and never.due(7) == ["layer"]
    before = snapshot(layer, optimizer)
    layer.values.grad = torch.zeros_like(layer.values)
    step(optimizer)
    check_nothing_changed(before, layer, optimizer)


# -- settings --


@pytest.mark.parametrize(
    "options, message",
    [
        ({"removal": "gradient"}, "removal must be"),
        ({"rule": "ch1"}, "rule must be"),
        ({"stop_overlap": 1.5}, r"stop_overlap must lie in \(0, 1\]"),
        ({"stop_overlap": 0.9, "may_return": False}, "needs may_return=True"),
        ({"chains": (("a",),)}, "a chain must be two or more names"),
        ({"chains": (("a*b*", "c"),)}, "at most one"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CHT(**options)


def test_presets_and_plans():
    assert CHT.paper() == CHT(fraction=Constant(0.3), stagger=False) and (CHT().rule, CHTs().rule) == ("ch3", "ch2")
    assert CHTs().temperature == Linear(1.0, 3.0)
    for method in (CHT(chains=(("*.up", "*.down"),)), CHTs(temperature=Constant(2.0), stop_overlap=0.9)):
        plan = Plan(density=0.5, method=method)
        assert Plan.from_dict(plan.to_dict()) == plan
    assert SET().expects_empty_rows is RigL().expects_empty_rows is False


def test_values_that_are_not_finite_are_left_alone():
    layer = layer_of(ACTIVE, (3, 4))
    with torch.no_grad():
        layer.values[0] = float("nan")
    rewirer, optimizer = engine(layer, CHTs(interval=1, end=1, fraction=Constant(0.5)))
    layer.values.grad = torch.zeros_like(layer.values)
    with pytest.warns(UserWarning, match="not all finite"):
        step(optimizer)
    assert units_of(layer) == sorted(ACTIVE) and rewirer.skipped == 1
