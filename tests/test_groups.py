"""Groups of rows that keep their number of units, at the start and over every rewire."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy import SET, Constant, Pattern, Plan, Rewirer, RigL, SparseLinear, Static, sparsify
from rarefy.groups import split
from rarefy.growth import Exact, Momentum, NormProduct, SampledTokens
from rarefy.nn import SparseLayer
from rarefy.selection import num_to_replace
from rewires import check_rewire, push, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::rarefy.GuardWarning")


def counts(layer: SparseLayer, groups: int) -> list[int]:
    """Units of each group of rows."""
    return torch.diff(layer.pattern.crow_indices).view(groups, -1).sum(dim=1).tolist()


@st.composite
def cases(draw):
    groups, rows, cols = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    block = draw(st.sampled_from([(1, 1), (1, 1), (4, 4), (2, 3)]))
    n = groups * rows * cols
    method = draw(st.sampled_from([SET, RigL]))
    options = {"fraction": Constant(draw(st.floats(0.1, 1))), "may_return": draw(st.booleans())}
    return groups, rows, cols, block, draw(st.integers(1, n)), method(interval=1, end=9, stagger=False, **options)


def expected(before: Pattern, score: Tensor, gradient: Tensor, k: int, groups: int, may_return: bool):
    """(dropped, grown): k over the groups by largest remainder, then each group by sorting, as if it were a layer."""
    per = gradient.numel() // groups
    active = before.unit_indices().tolist()
    mine = [[unit for unit in active if unit // per == g] for g in range(groups)]
    parts = [k * len(units) // len(active) for units in mine]
    largest = sorted(range(groups), key=lambda g: (-(k * len(mine[g]) / len(active) - parts[g]), g))
    for g in largest[: k - sum(parts)]:
        parts[g] += 1
    of = dict(zip(active, score.tolist(), strict=True))
    gone, born = set(), set()
    for g, units in enumerate(mine):
        part = min(parts[g], per - len(units))
        dropped = sorted(units, key=lambda unit: (of[unit], unit))[:part]
        candidates = [u for u in range(g * per, (g + 1) * per) if u not in units or (may_return and u in dropped)]
        gone |= set(dropped)
        born |= set(sorted(candidates, key=lambda unit: (-float(gradient[unit]), unit))[:part])
    return gone - born, born - gone


@settings(max_examples=60)
@given(cases(), st.integers(1, 2), st.integers(0, 2**16))
def test_2_3_groups_keep_their_counts_and_choose_alone(case, micro_batches, seed):
    """Counts are exact for random and gradient growth; gradient growth is that of the dense gradient, group by group,
    streamed (one micro-batch) and accumulated (two).
    """
    groups, rows, cols, block, units, method = case
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * rows * block[0], cols * block[1])
    layer = SparseLinear.from_pattern(Pattern.with_units(shape, units, block, generator), bias=False)
    few = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0])
    with torch.no_grad():
        layer.values.copy_(few[torch.randint(5, layer.values.shape, generator=generator)])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    push(layer, torch.zeros(groups * rows * cols))
    optimizer.step()  # so that there is a state to move
    optimizer.zero_grad()
    rewirer = Rewirer({"layer": layer}, method, balance={"layer": groups}).attach(optimizer, hook=False)
    before_all = counts(layer, groups)
    for _ in range(3):
        gradient = few[torch.randint(5, (groups * rows * cols,), generator=generator)]
        for _ in range(micro_batches):
            push(layer, gradient)
        optimizer.step()
        before = snapshot(layer, optimizer)
        k = num_to_replace(rewirer._fraction(rewirer.t + 1), units, groups * rows * cols)
        made = len(rewirer.history)
        rewirer.step()
        assert counts(layer, groups) == before_all
        if len(rewirer.history) > made:
            gone, born = check_rewire(before, layer, optimizer)
            if isinstance(method, RigL):
                score = torch.from_numpy(before.rows["values"].copy()).view(torch.float32).abs()
                wanted = expected(
                    before.pattern, score.view(units, -1).mean(dim=1), gradient.abs(), k, groups, method.may_return
                )
                assert (set(gone), set(born)) == wanted
        optimizer.zero_grad()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), st.floats(0, 1))
def test_k_is_split_exactly_where_there_is_room(sizes, fraction):
    active, every = [a for a, _ in sizes], [a + more for a, more in sizes]
    k = round(fraction * sum(active))
    parts = split(k, active, every)
    assert all(0 <= part <= n - a for part, a, n in zip(parts, active, every, strict=True))
    if all(n - a >= a for a, n in zip(active, every, strict=True)):
        assert sum(parts) == k
        assert all(abs(part - k * a / max(sum(active), 1)) < 1 for part, a in zip(parts, active, strict=True))


class Projection(nn.Module):
    """What a plan finds in an attention block."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x)[..., : x.shape[-1]])


@pytest.mark.parametrize("init", ["random", "balanced", "magnitude"])
@pytest.mark.parametrize("method", [Static(), SET(interval=2, end=20), RigL(interval=2, end=20)], ids=str)
def test_a_plan_keeps_heads_equal(init, method):
    """12 heads' rows of 6 x 24, at 20%: 345.6 units, so 29 or 28 a head, for good."""
    model = Projection()
    rewirer = sparsify(model, Plan(density=0.2, method=method, init=init, balance={"*qkv": 12}))
    qkv = rewirer.layers["qkv"]
    each = counts(qkv, 12)
    assert max(each) - min(each) <= 1 and sum(each) == qkv.num_units and rewirer.balance == {"qkv": 12}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer)
    for _ in range(9):
        model(torch.randn(16, 24)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counts(qkv, 12) == each
    assert method.rewires == any(record["layer"] == "qkv" for record in rewirer.history)


SIGNALS = [
    Exact(),
    NormProduct(),
    SampledTokens(tokens=8),
    Momentum(pool=1.5, steps=2),
    Momentum(pool=1.5, steps=2, source=NormProduct()),
]


@pytest.mark.parametrize("signal", SIGNALS, ids=str)
def test_every_signal_finds_enough_in_each_group(signal):
    """Gradients that are large in one head's rows alone must not leave the others without candidates."""
    model = Projection()
    method = RigL(interval=2, end=20, stagger=False, fraction=Constant(0.5), signal=signal)
    rewirer = sparsify(model, Plan(density=0.2, method=method, balance={"*qkv": 12}))
    qkv = rewirer.layers["qkv"]
    before = counts(qkv, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rewirer.attach(optimizer)
    scale = torch.ones(72).index_fill_(0, torch.arange(6), 1000.0)
    for _ in range(4):
        (model.qkv(torch.randn(16, 24)) * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    made = [record for record in rewirer.history if record["layer"] == "qkv"]
    assert len(made) == 2 and all(record["changed"] == qkv.num_units // 2 for record in made)
    assert counts(qkv, 12) == before


def test_a_model_on_the_meta_device_is_balanced_too():
    with torch.device("meta"):
        model = Projection()
    rewirer = sparsify(model, Plan(density=0.2, method=Static(), balance={"qkv": 12}))
    model.to_empty(device="cpu")
    for layer in rewirer.layers.values():
        layer.reset_parameters()
    each = counts(rewirer.layers["qkv"], 12)
    assert max(each) - min(each) <= 1


def test_a_plan_says_what_is_balanced_and_refuses_what_cannot_be():
    plan = Plan(density=0.2, balance={"qkv": 12})
    assert "units kept equal between groups of rows: qkv (12)" in str(plan.explain(Projection()))
    assert Plan.from_dict(plan.to_dict()) == plan
    with pytest.raises(ValueError, match="qkv has 72 rows of units, which 7 equal groups cannot share"):
        sparsify(Projection(), Plan(density=0.2, balance={"qkv": 7}))
    with pytest.raises(ValueError, match="balance: 'nothing' matches no layer"):
        sparsify(Projection(), Plan(density=0.2, balance={"nothing": 2}))
    with pytest.raises(ValueError, match="number of groups of 'qkv' must be at least 1, got 0"):
        Plan(density=0.2, balance={"qkv": 0})


@pytest.mark.parametrize(
    "method, sentence",
    [
        (RigL(), "rigl: each layer rewires every 100 steps, the layers in turn, from step 0 to 75% of the run"),
        (SET(begin=5, end=50, stagger=False), "all layers at once, from step 5 to step 50; the pattern is frozen from"),
        (Static(), "static: the pattern is frozen from the first step"),
    ],
    ids=str,
)
def test_an_explanation_says_when_the_pattern_is_frozen(method, sentence):
    assert sentence in str(Plan(density=0.2, method=method).explain(Projection()))
