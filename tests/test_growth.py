"""Growth signals: each against what it says it estimates, and under the rules that hold for exact growth."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rarefy import Constant, Exact, Momentum, NormProduct, Pattern, Plan, RigL, SampledTokens, Signal, SparseLinear
from rarefy.growth import Collector, Request
from rarefy.growth import signal as signals
from rarefy.growth.norms import large_products
from rarefy.ops import Index
from rarefy.ops import sink as sinks
from rarefy.rewiring import ranks
from rarefy.selection import highest
from rewires import engine, layer_of, push, step, units_of

SIGNALS: dict[str, Signal] = {
    "exact": Exact(),
    "tokens": SampledTokens(tokens=5),
    "tokens by norm": SampledTokens(tokens=5, by="norm"),
    "norms": NormProduct(),
    "momentum": Momentum(steps=3),
    "momentum of norms": Momentum(steps=3, source=NormProduct()),
    "momentum of exact": Momentum(steps=2, pool=3, source=Exact()),
}
BLOCKS = [(1, 1), (4, 4), (2, 3)]


def request(layer: SparseLinear, k: int, **changes) -> Request:
    made = Request(name="layer", step=1, seed=0, values=layer.values, k=k, returns=False, calls=1, ranks=ranks)
    return dataclasses.replace(made, **changes)


def rows(layer: SparseLinear, count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """dy and x whose rows and columns differ in size, as those of a network do."""
    g = torch.Generator().manual_seed(seed)
    dy = torch.randn(count, layer.out_features, generator=g) * torch.rand(layer.out_features, generator=g)
    x = torch.randn(count, layer.in_features, generator=g) * torch.rand(layer.in_features, generator=g)
    return dy * torch.rand(count, 1, generator=g) ** 2, x


def layer_with(block: tuple[int, int] = (1, 1), density: float = 0.3) -> SparseLinear:
    return SparseLinear(24, 36, density=density, block=block, generator=torch.Generator().manual_seed(1))


def best_by(scores: Tensor, layer: SparseLinear, k: int) -> list[int]:
    """The k best absent units by (R, C) scores, ascending: a plain sort."""
    absent = sorted(set(range(scores.numel())) - set(units_of(layer)))
    flat = scores.flatten().tolist()
    return sorted(sorted(absent, key=lambda unit: (-flat[unit], unit))[:k])


def unit_grid(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    return matrix.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).mean(dim=(1, 3))


def chosen(collector: Collector, layer: SparseLinear, k: int) -> list[int]:
    found = collector.found(layer.index, None)
    assert found.scores.dtype == torch.float32 and not set(found.units.tolist()) & set(units_of(layer))
    assert found.units.unique().numel() == found.units.numel() >= k
    return highest(found.scores, found.units, k).tolist()


# -- what each estimates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("signal", [Exact(), SampledTokens(tokens=40), SampledTokens(tokens=99, by="norm")], ids=str)
@pytest.mark.parametrize("calls", [1, 2])
def test_signals_that_see_every_row_are_exact(signal, block, calls):
    layer = layer_with(block)
    dy, x = rows(layer)
    collector = signal.collector(request(layer, 7, calls=calls if isinstance(signal, Exact) else None))
    for part in range(calls):
        collector.add(layer.index, dy[part::calls], x[part::calls])
        collector._pass = 0  # one step: further calls without a gradient in between
        layer.values.grad = torch.zeros_like(layer.values)
    gradient = unit_grid((dy.double().T @ x.double()).abs(), block)
    assert chosen(collector, layer, 7) == best_by(gradient, layer, 7)


@pytest.mark.parametrize("by", ["chance", "norm"])
def test_a_sample_of_rows_is_unbiased(by):
    """The mean over many draws is the gradient, to within five standard errors of each entry."""
    layer, draws = layer_with(), 600
    dy, x = rows(layer)
    total, squares = torch.zeros(36, 24, dtype=torch.float64), torch.zeros(36, 24, dtype=torch.float64)
    for seed in range(draws):
        collector = SampledTokens(tokens=8, by=by).collector(request(layer, 1, seed=seed))
        collector.add(layer.index, dy, x)
        assert collector._rows is not None and [part.shape[0] for part in collector._rows] == [8, 8]
        estimate = collector._rows[0].double().T @ collector._rows[1].double()
        total += estimate
        squares += estimate.square()
    mean = total / draws
    error = ((squares / draws - mean.square()) / draws).sqrt()
    assert ((mean - dy.double().T @ x.double()).abs() <= 5 * error + 1e-6).all()


def test_rows_of_large_norm_are_drawn_more_often():
    """Of 100 rows one has all but nothing: by norm it is never missed, and counts as what it is."""
    layer = layer_with()
    dy, x = torch.full((100, 36), 1e-6), torch.full((100, 24), 1e-6)
    dy[63], x[63] = torch.randn(36), torch.randn(24)
    collector = SampledTokens(tokens=4, by="norm").collector(request(layer, 3))
    collector.add(layer.index, dy, x)
    assert chosen(collector, layer, 3) == best_by(torch.outer(dy[63], x[63]).abs(), layer, 3)


def test_tokens_are_shared_by_the_calls_of_a_step():
    """256 rows a step, not a micro-batch: 64 of each of four."""
    layer = layer_with()
    collector = SampledTokens(tokens=256).collector(request(layer, 1, calls=4))
    for _ in range(4):
        collector.add(layer.index, *rows(layer, 300))
        layer.values.grad = torch.zeros_like(layer.values)
    assert collector._rows is not None and collector._rows[0].shape == (256, 36)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("k", [1, 5, 20])
def test_norms_are_products_of_norms(block, k):
    layer = layer_with(block)
    dy, x = rows(layer)
    collector = NormProduct().collector(request(layer, k))
    collector.add(layer.index, dy[:15], x[:15])
    layer.values.grad = torch.zeros_like(layer.values)
    collector.add(layer.index, dy[15:], x[15:])
    bound = unit_grid(torch.outer(dy.double().norm(dim=0), x.double().norm(dim=0)), block)
    assert (unit_grid((dy.double().T @ x.double()).abs(), block) <= bound).all()
    assert chosen(collector, layer, k) == best_by(bound, layer, k)


@given(data=st.data())
def test_large_products_hold_the_best(data):
    """Any norms, with ties and zeros: what it returns holds the k best absent, or it leaves the choice to the scan."""
    number = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 64.0])
    r = torch.tensor(data.draw(st.lists(number, min_size=1, max_size=9)))
    c = torch.tensor(data.draw(st.lists(number, min_size=1, max_size=9)))
    n = r.numel() * c.numel()
    active = data.draw(st.sets(st.integers(0, n - 1), max_size=n))
    pattern = Pattern.from_units(torch.tensor(sorted(active), dtype=torch.int64), (r.numel(), c.numel()), 1)
    k = data.draw(st.integers(0, n))
    found = large_products(Index.of(pattern), r, c, k)
    scores = torch.outer(r, c).flatten()
    absent = [unit for unit in range(n) if unit not in active]
    k = min(k, len(absent))
    if found is None:
        assert not k or sum(float(scores[unit]) > 0 for unit in absent) < n
        return
    units, products = found
    assert torch.equal(products, scores[units]) and set(units.tolist()) <= set(absent)
    best = sorted(absent, key=lambda unit: (-float(scores[unit]), unit))[:k]
    assert highest(products, units, k).tolist() == sorted(best)


def test_large_products_do_not_keep_much_more_than_is_wanted():
    """Norms as uneven as those of networks: at most twice as many as asked for are above the threshold."""
    g = torch.Generator().manual_seed(0)
    r, c = (torch.randn(size, generator=g).exp() for size in (400, 300))
    index = Index.of(Pattern.random((400, 300), 0.1, 1, g))
    for k in (10, 100, 4000, 40000):
        found = large_products(index, r, c, k)
        assert found is not None and k <= found[0].numel() <= 2 * k + 20


# -- momentum ---------------------------------------------------------------------------------------------------------


def grows(method: RigL, pushes: list[Tensor], active: dict[int, float], shape=(2, 4)) -> list[int]:
    layer = layer_of(active, shape)
    _, optimizer = engine(layer, method)
    for gradient in pushes:
        push(layer, gradient)
        step(optimizer)
    return sorted(set(units_of(layer)) - set(active))


@pytest.mark.parametrize(
    "beta, steps, grown",
    [
        (0.5, 3, [5]),
        (0.0, 3, [7]),  # the last step alone
        (0.9, 2, [7]),
    ],
)
def test_momentum_is_the_exponential_mean_by_hand(beta, steps, grown):
    """Units 4 to 7 over three steps; the pool is all four absent ones, so only the mean decides.

    With 0.5 and three steps: 4 has .125 * 8 - .25 * 4 = 0, 5 has .125 * 8 + .25 * 8 + .5 * 8 = 7, 6 has .5, 7 has 4.5.
    """
    pushes = [torch.tensor([0.0] * 4 + row) for row in ([8.0, 8, 0, 0], [-4.0, 8, 0, 0], [0.0, 8, 1, 9])]
    if beta == 0.9:
        pushes[1][5] = -8.0  # .09 * -8 + .1 * 8 = 0.08 against .1 * 9
    method = RigL(interval=3, end=3, fraction=Constant(0.25), signal=Momentum(pool=4, steps=steps, beta=beta))
    assert grows(method, pushes, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}) == grown


def test_momentum_grows_from_its_pool_alone():
    """Norms choose {4, 5} of step 2 as pool; what is largest at step 3, unit 7, is not in it."""
    eye = [torch.tensor([0.0] * 4 + row) for row in ([9.0, 9, 9, 9], [5.0, 4, 1, 0], [1.0, 3, 0, 90])]
    method = RigL(interval=3, end=3, fraction=Constant(0.25), signal=Momentum(pool=2, steps=2, source=Exact()))
    assert grows(method, eye, {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}) == [5]


def test_momentum_that_was_armed_for_one_step_grows_by_its_source():
    """A rewire after the first step leaves no step to watch a pool in."""
    method = RigL(interval=1, end=1, fraction=Constant(0.25), signal=Momentum(steps=2, source=Exact()))
    assert grows(method, [torch.tensor([0.0] * 4 + [1, 3, 0, 2])], {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}) == [5]


def test_rule_6_7_momentum_looks_at_its_steps_alone():
    layer = SparseLinear(16, 16, density=0.2)
    _, optimizer = engine(layer, RigL(interval=8, end=16, fraction=Constant(0.3), signal=Momentum(steps=3)))
    for t in range(1, 20):
        assert sinks.armed(layer.sink) == (t in (6, 7, 8, 14, 15, 16))
        layer(torch.randn(3, 16)).sum().backward()
        step(optimizer)


def test_momentum_forgets_a_step_that_was_never_applied():
    """As AMP's scaler skips one: its gradient does not count."""
    patterns = []
    for skipped in (False, True):
        layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, (2, 4))
        _, optimizer = engine(layer, RigL(interval=3, end=3, fraction=Constant(0.25), signal=Momentum(pool=4)))
        for t in range(3):
            if skipped and t == 1:
                push(layer, torch.tensor([0.0] * 4 + [1000, 0, 0, 0]))
                optimizer.zero_grad()
            push(layer, torch.tensor([0.0] * 4 + [1, 2, 3, 0]))
            step(optimizer)
        patterns.append(units_of(layer))
    assert patterns[0] == patterns[1] == [1, 2, 3, 6]


# -- the rules, for each ----------------------------------------------------------------------------------------------


def run(signal: Signal, parts: Callable[[int], list[Tensor]], steps: int = 12, **options) -> list[Pattern]:
    torch.manual_seed(5)
    layer, target = SparseLinear(12, 20, density=0.3), torch.randn(20, 12)
    method = RigL(**{"interval": 3, "end": 99, "fraction": Constant(0.3), "signal": signal, **options})
    rewirer, optimizer = engine(layer, method, lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.5))
    patterns = []
    for t in range(steps):
        pieces = parts(t)
        for x in pieces:
            ((layer(x) - x @ target.T).pow(2).mean() / len(pieces)).backward()
        step(optimizer)
        patterns.append(layer.pattern)
    assert rewirer.skipped == 0 and len(rewirer.history) == steps // 3
    return patterns


def batch(t: int) -> Tensor:
    return torch.randn(24, 12, generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("may_return", [False, True])
def test_rule_8_1_the_same_twice(name, may_return):
    patterns = [run(SIGNALS[name], lambda t: [batch(t)], may_return=may_return) for _ in range(2)]
    assert patterns[0] == patterns[1] and len(set(patterns[0])) >= 4


@pytest.mark.parametrize("name", ["exact", "norms", "momentum", "momentum of norms", "momentum of exact"])
@pytest.mark.parametrize("may_return", [False, True])
def test_rule_6_4_micro_batches_choose_as_the_whole_batch(name, may_return):
    whole = run(SIGNALS[name], lambda t: [batch(t)], may_return=may_return)
    assert whole == run(SIGNALS[name], lambda t: list(batch(t).chunk(3)), may_return=may_return)


def test_rule_8_1_a_sample_depends_on_the_seed_and_the_step():
    layer = layer_with()
    dy, x = rows(layer, 400)

    def drawn(**changes) -> Tensor:
        collector = SampledTokens(tokens=9).collector(request(layer, 1, **changes))
        collector.add(layer.index, dy, x)
        assert collector._rows is not None
        return collector._rows[1]

    state = torch.get_rng_state()
    assert torch.equal(drawn(), drawn())
    others = [drawn(seed=1), drawn(step=2), drawn(name="other")]
    assert not any(torch.equal(drawn(), other) for other in others)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("name", SIGNALS)
def test_rule_8_3_a_gradient_that_is_not_finite_skips_the_rewire(name):
    """The values stay finite, as the optimizer moves nothing; every row is seen."""
    layer = SparseLinear(8, 6, density=0.3, generator=torch.Generator().manual_seed(0))
    method = RigL(interval=3, end=3, fraction=Constant(0.3), signal=SIGNALS[name])
    rewirer, optimizer = engine(layer, method)
    before = layer.pattern
    for t in range(3):
        x = torch.randn(4, 8)
        if t == 2:
            x[1, :] = math.inf
        layer(x).sum().backward()
        assert layer.values.grad is not None
        layer.values.grad.zero_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(optimizer)
    assert rewirer.skipped == 1 and layer.pattern == before and len(caught) == 1


@pytest.mark.parametrize("name", SIGNALS)
def test_rule_6_an_unused_layer_rewires_nothing_and_watches_on(name):
    """At its rewire: it stays. In a step before: the rewire comes all the same."""
    for unused, rewired in ((2, [3, 6]), (3, [6])):
        layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0}, (2, 4))
        rewirer, optimizer = engine(layer, RigL(interval=3, end=6, fraction=Constant(0.4), signal=SIGNALS[name]))
        for t in range(1, 7):
            if t != unused:
                push(layer, torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]) * t)
            step(optimizer)
        assert [record["step"] for record in rewirer.history] == rewired


# -- as settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=list(SIGNALS))
def test_plans_hold_signals(signal, tmp_path):
    plan = Plan(density=0.1, method=RigL(signal=signal))
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml())
    assert Plan.from_yaml(file) == plan == Plan.from_dict(plan.to_dict())


def test_a_signal_can_be_named_alone():
    plan = Plan.from_dict({"density": 0.1, "method": {"name": "rigl", "signal": "normproduct"}})
    assert plan.method.signal == NormProduct()
    nested = {"name": "momentum", "pool": 3, "source": {"name": "sampledtokens", "tokens": 8}}
    plan = Plan.from_dict({"density": 0.1, "method": {"name": "rigl", "signal": nested}})
    assert plan.method.signal == Momentum(pool=3, source=SampledTokens(tokens=8))
    with pytest.raises(ValueError, match=r"plan.method.signal: signal: there is no 'norm'; did you mean 'normproduct'"):
        Plan.from_dict({"density": 0.1, "method": {"name": "rigl", "signal": "norm"}})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SampledTokens(tokens=0), "tokens must be at least 1, got 0"),
        (
            lambda: SampledTokens(by="luck"),  # type: ignore[arg-type]
            "by must be 'chance' or 'norm', got 'luck'",
        ),
        (lambda: Momentum(pool=0.5), "pool must be at least 1, got 0.5"),
        (lambda: Momentum(steps=0), "steps must be at least 1, got 0"),
        (lambda: Momentum(beta=1.0), r"beta must lie in \[0, 1\), got 1.0"),
        (lambda: Momentum(steps=1, source=Exact()), "a source looks at one step, the first of at least two"),
        (lambda: Momentum(source=Momentum()), "a source looks at one step"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_signal_of_ones_own_is_one_class():
    """Grows where the output's gradient alone is large."""

    class Rows(Collector):
        def see(self, index, dy, x):
            self.size = dy.abs().sum(dim=0)

        def found(self, index, grow_score):
            cols = index.in_features
            absent = torch.ones(index.out_features * cols, dtype=torch.bool)
            absent[signals.active_units(index)] = False
            units = absent.nonzero().flatten()
            return signals.Found(units, self.size[units // cols], None)

    class Loudest(Signal):
        def collector(self, request):
            return Rows(request)

        def held_bytes(self, shape, k, unit_entries):
            return 4 * shape[0]

    gradient = torch.tensor([0.0, 1, 0, 0, 0, 9, 0, 0])
    method = RigL(interval=1, end=1, fraction=Constant(0.4), signal=Loudest())
    assert grows(method, [gradient], {0: 1.0, 1: 2.0, 2: 3.0}) == [4]
    assert signals.registered()["loudest"] is Loudest
    assert Plan.from_dict({"density": 0.1, "method": {"name": "rigl", "signal": "loudest"}}).method.signal == Loudest()


def test_rule_6_4_the_plan_states_what_a_signal_holds():
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20))
    for signal, expected in (
        (Exact(), 4 * 1200),
        (NormProduct(), 4 * 70),
        (SampledTokens(tokens=10), 4 * 10 * 70),
        (Momentum(pool=2, steps=2), 2 * 36 * 28),  # of 1200 units 120 exist, and 36 are replaced at first
    ):
        explanation = Plan(density=0.1, method=RigL(signal=signal)).explain(model)
        assert explanation.growth_bytes == expected and f"{expected:,} bytes" in str(explanation)
