"""rarefy.AdamW: torch's AdamW where nothing rewires, and what a newborn gets where something does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import Constant, Plan, Rewirer, RigL, SparseLinear, sparsify
from rarefy.ops import library, triton, using
from rarefy.rounding import key_of, to_bfloat16
from rewires import layer_of, push, units_of

EIGHT = torch.tensor([5.0, 1, 2, 3, 4, 6, 7, 8])


def mixed_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 20),
        nn.LayerNorm(20),
        nn.Tanh(),
        SparseLinear(20, 12, density=0.3, block=4),
        nn.Tanh(),
        nn.Linear(12, 3),
    )
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))  # no dimensions at all
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(30)) -> None:
    for at in steps:
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(at)).to(next(model.parameters()).dtype)
        loss = (model(x) * model.scale).pow(2).mean() + x.abs().mean()  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.0},
        {"lr": 0.1, "weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": 0.01, "betas": (0.0, 0.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("ramp", [0, 100])
def test_is_torchs_adamw_where_nothing_rewires(options, ramp):
    """Within rounding, over 30 steps; fewer where betas are 0, as a gradient's sign, however small it is, is a step."""
    steps = range(30 if any(options.get("betas", (0.9, 0.999))) else 5)
    mine, theirs = mixed_model(), mixed_model()
    train(mine, rarefy.AdamW(mine.parameters(), **options, ramp=ramp), steps)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **options, foreach=False), steps)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_learning_rates_may_change_between_steps():
    mine, theirs = mixed_model(), mixed_model()
    for model, kind in ((mine, rarefy.AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
        for at in range(10):
            train(model, optimizer, range(at, at + 1))
            schedule.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def newborn_after(old: int, ramp: int, *, plain: bool = False) -> tuple[list[float], Rewirer]:
    """Updates of a newborn, step by step, in units of the learning rate: its gradient is 1 throughout.

    The layer has trained for `old` steps when it rewires; the newborn is unit 7.
    """
    layer = layer_of({0: 1e-9, 1: 2.0, 2: 3.0}, (2, 4))
    lr = 1e-3
    if plain:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = rarefy.AdamW(layer.parameters(), lr=lr, weight_decay=0.0, ramp=ramp)
    method = RigL(interval=old, end=old, fraction=Constant(0.3))
    rewirer = Rewirer({"layer": layer}, method).attach(optimizer)
    for _ in range(old):
        push(layer, torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 8]))
        with torch.no_grad():
            layer.values[0] = 1e-9
        optimizer.step()
        optimizer.zero_grad()
    assert units_of(layer) == [1, 2, 7]
    updates = []
    for _ in range(6):
        before = float(layer.values.detach()[2])
        push(layer, torch.ones(8))
        optimizer.step()
        optimizer.zero_grad()
        updates.append((before - float(layer.values.detach()[2])) / lr)
    return updates, rewirer


def test_a_newborns_first_update_is_of_the_usual_size():
    """With the correction by its own age, a constant gradient moves it by the learning rate, from the first step on."""
    assert newborn_after(50, 0)[0] == pytest.approx([1.0] * 6, rel=1e-4)


def test_plain_adamw_overshoots_by_the_uncorrected_moments():
    """(1 - beta1) / sqrt(1 - beta2) = 3.16 at once when the step count is old: what the ages are for.

    At step 50 the correction of the second moment is sqrt(1 - .999^51); the first is all but done.
    """
    updates = newborn_after(50, 0, plain=True)[0]
    wanted = 0.1 / (1 - 0.9**51) * math.sqrt(1 - 0.999**51) / math.sqrt(0.001)
    assert updates[0] == pytest.approx(wanted, rel=1e-3)
    old = newborn_after(1500, 0, plain=True)[0][0]
    assert old == pytest.approx(0.1 * math.sqrt(1 - 0.999**1501) / math.sqrt(0.001), rel=1e-2) and old > 2.5


@pytest.mark.parametrize("ramp", [1, 4, 10])
def test_a_newborns_updates_ramp_up(ramp):
    assert newborn_after(50, ramp)[0] == pytest.approx([min(age / ramp, 1.0) for age in range(1, 7)], rel=1e-4)


def test_what_was_there_from_the_start_has_no_ramp():
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    optimizer = rarefy.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0, ramp=100)
    push(layer, torch.ones(8))
    optimizer.step()
    torch.testing.assert_close(layer.values.detach(), torch.tensor([1.0, 2.0]) - 1e-3)


def test_survivors_do_not_notice_newborns():
    """The update of a survivor is what it is without any rewire."""
    alone, beside = layer_of({1: 2.0, 2: 3.0}, (2, 4)), layer_of({0: 1e-9, 1: 2.0, 2: 3.0}, (2, 4))
    for layer, end in ((alone, 0), (beside, 5)):
        optimizer = rarefy.AdamW(layer.parameters(), lr=1e-3)
        Rewirer({"layer": layer}, RigL(interval=5, end=end, fraction=Constant(0.4))).attach(optimizer)
        for at in range(12):
            push(layer, torch.tensor([0.0, at % 3, -at % 5, 0, 0, 0, 0, 8]))
            if at < 4:
                with torch.no_grad():
                    layer.values[layer.pattern.unit_indices() == 0] = 1e-9
            optimizer.step()
            optimizer.zero_grad()
    assert units_of(beside) == [1, 2, 7]
    torch.testing.assert_close(alone.values.detach(), beside.values.detach()[:2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_state_round_trip(dtype):
    """Bitwise after save and load, in another process's optimizer; ages stay integers, whatever the parameters are."""

    def build() -> tuple[nn.Module, Rewirer, rarefy.AdamW]:
        model = mixed_model().to(dtype)
        method = RigL(interval=2, end=50, fraction=Constant(0.4))
        rewirer = sparsify(model, Plan(density=0.4, method=method))
        optimizer = rarefy.AdamW(model.parameters(), lr=0.01)
        return model, rewirer.attach(optimizer), optimizer

    straight = build()
    train(straight[0], straight[2], range(20))
    first = build()
    train(first[0], first[2], range(300 if dtype == torch.bfloat16 else 11))
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = build()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        mine, theirs = first[2].state[p], second[2].state[q]
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
        for name in ("exp_avg", "exp_avg_sq", "age"):
            assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
    if dtype != torch.bfloat16:
        train(second[0], second[2], range(11, 20))
        for p, q in zip(straight[0].parameters(), second[0].parameters(), strict=True):
            assert torch.equal(p, q)


def test_loaded_ages_are_ones_own():
    model = mixed_model()
    optimizer = rarefy.AdamW(model.parameters())
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    other = rarefy.AdamW(model.parameters())
    other.load_state_dict(state)
    optimizer.state[next(model.parameters())]["age"].zero_()
    assert other.state[next(model.parameters())]["age"].min() == 2


def test_state_is_of_the_size_of_the_values():
    layer = SparseLinear(100, 100, density=0.1, bias=False)
    optimizer = rarefy.AdamW(layer.parameters())
    layer(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    tensors = [t for t in optimizer.state[layer.values].values() if isinstance(t, Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 12 * layer.pattern.nnz


def test_empty_and_unused_parameters():
    empty = SparseLinear.from_pattern(rarefy.Pattern.with_units((4, 4), 0))
    unused = nn.Parameter(torch.ones(3))
    optimizer = rarefy.AdamW([*empty.parameters(), unused], lr=0.1)
    empty(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert unused.tolist() == [1, 1, 1] and unused not in optimizer.state


def test_closures_are_called_with_gradients_on():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = rarefy.AdamW([p], lr=0.1, weight_decay=0.0)

    def closure() -> float:
        loss = p.pow(2).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(p.detach(), torch.tensor([1.9]))


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"ramp": -1}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}],
)
def test_bad_settings(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match="betas must lie in" if name == "betas" else "must not be negative"):
        rarefy.AdamW([nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused():
    embedding, other = nn.Embedding(4, 3, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = rarefy.AdamW([other, *embedding.parameters()])
    (embedding(torch.tensor([1])) * other).sum().backward()
    with pytest.raises(ValueError, match=r"rarefy\.AdamW takes dense gradients"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3)) and not optimizer.state[other]


# -- parameter groups --


def test_groups_decay_values_and_spare_the_rest():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 5),
            "norm": nn.LayerNorm(5),
            "dense": nn.Linear(5, 4),
            "sparse": SparseLinear(8, 8, density=0.3),
            "blocks": SparseLinear(8, 8, density=0.3, block=4),
        }
    )
    model["dense"].weight.requires_grad_(False)
    decay, spare = rarefy.param_groups(model, lr=0.1, weight_decay=0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == {"sparse.values", "blocks.values"}
    assert {names[id(p)] for p in spare["params"]} == {
        *("embed.weight", "norm.weight", "norm.bias", "dense.bias", "sparse.bias", "blocks.bias"),
    }
    assert (decay["lr"], decay["weight_decay"], spare["weight_decay"]) == (0.1, 0.2, 0.0)
    torch.optim.AdamW(rarefy.param_groups(model, lr=0.1, weight_decay=0.2))


def test_tied_weights_are_in_one_group_once():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    groups = rarefy.param_groups(model, lr=0.1, weight_decay=0.2)
    assert [len(group["params"]) for group in groups] == [1] and groups[0]["weight_decay"] == 0.0


# -- bf16, and the kernel --


def test_stochastic_rounding_takes_a_neighbour_and_the_mean_is_exact():
    exact = torch.randn(2_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-20, 20, (2_000,))
    low = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    high = ((exact.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    draws = torch.stack([to_bfloat16(exact, key_of(1, at)).float() for at in range(400)])
    assert ((draws == low) | (draws == high)).all()
    share, wanted = (draws == high).float().mean(0), (exact - low) / (high - low)
    assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / 400).sqrt() + 1e-3).all()
    assert abs(float((share - wanted).mean())) < 4 * 0.5 / (400 * 2_000) ** 0.5


def test_stochastic_rounding_leaves_alone_what_it_must():
    special = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan])
    quiet = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a nan whose bits would overflow
    for key in range(20):
        found = to_bfloat16(torch.cat([special, quiet]), key)
        torch.testing.assert_close(found[:-1].float(), special, rtol=0, atol=0, equal_nan=True)
        assert found[-1].isnan() and torch.equal(found[:2].signbit(), torch.tensor([False, True]))


def test_rounding_is_that_of_its_key_alone():
    exact = torch.randn(1_000)
    assert torch.equal(to_bfloat16(exact, 7), to_bfloat16(exact, 7))
    assert torch.equal(to_bfloat16(exact[:10], 7), to_bfloat16(exact, 7)[:10])
    assert not torch.equal(to_bfloat16(exact, 7), to_bfloat16(exact, 8))
    assert len({key_of(step, at) for step in range(100) for at in range(100)}) == 10_000


def test_weights_in_bf16_move_by_steps_below_their_precision():
    """A thousand steps of 1e-4 at a weight of 1, whose neighbours in bf16 are 4e-3 below and 8e-3 above."""
    p = nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    optimizer = rarefy.AdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(1_000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach().float().mean()) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (7, 4, 3), (), (0, 4), (300, 5)], ids=str)
def test_the_kernel_does_what_plain_torch_does(dtype, shape):
    """Newborns among them; in bf16 the same draws, so the same bits but where fp32 rounding decides."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    if not triton.usable():
        pytest.skip("no GPU, and triton was imported without TRITON_INTERPRET=1")
    where = "cpu" if triton.interpreted() else "cuda"
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95), "ramp": 5}
    ps, optimizers = [], []
    for device, name in (("cpu", "auto"), (where, "triton")):
        p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype))
        optimizer = rarefy.AdamW([p], **settings)
        for step in range(8):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 9)).to(device, dtype)
            if step == 4 and p.dim():
                for state in ("age", "exp_avg", "exp_avg_sq"):
                    optimizer.state[p][state][::3] = 0
            version = p._version
            with using(name):
                optimizer.step()
            assert not p.numel() or p._version > version
        ps.append(p.detach().cpu().float())
        optimizers.append(optimizer.state[p])
    if dtype == torch.float32:
        torch.testing.assert_close(ps[1], ps[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizers[1]["exp_avg_sq"].cpu(), optimizers[0]["exp_avg_sq"], rtol=1e-5, atol=1e-7)
    else:
        same = ps[0] == ps[1]
        assert same.float().mean() > 0.9 or same.numel() < 2
        torch.testing.assert_close(ps[1], ps[0], rtol=0.03, atol=0.01)
    assert torch.equal(optimizers[0]["age"], optimizers[1]["age"].cpu())


@pytest.mark.skipif(not library.isas(), reason="no compiled kernels here")
@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("shape", [(), (1,), (7,), (40, 3), (5, 4, 4), (70_003,)], ids=str)
@pytest.mark.parametrize("born", [False, True], ids=["old", "newborns"])
def test_the_cpu_kernel_does_what_plain_torch_does(isa, shape, born):
    generator = torch.Generator().manual_seed(1)
    start, results = torch.randn(shape, generator=generator), []
    grads = [torch.randn(shape, generator=generator) for _ in range(6)]
    for name in (isa, "reference"):
        p = nn.Parameter(start.clone())
        optimizer = rarefy.AdamW([p], lr=0.1, weight_decay=0.1, ramp=3)
        with using(name):
            for at, grad in enumerate(grads):
                p.grad = grad.clone()
                optimizer.step()
                if born and at == 2 and shape:
                    state = optimizer.state[p]
                    state["age"][::2] = 0
                    state["exp_avg"][::2] = 0
                    state["exp_avg_sq"][::2] = 0
        results.append((p.detach(), *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "age"))))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_the_cpu_kernel_gives_the_same_bits_whatever_the_threads():
    """Of parameters that are cut between threads, and of those that lie between two such."""
    generator, threads, found = torch.Generator().manual_seed(1), torch.get_num_threads(), []
    sizes = (20_011, 5, 0, 37, 30_003, 1, 0)
    starts, grads = ([torch.randn(size, generator=generator) for size in sizes] for _ in range(2))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ps = [nn.Parameter(start.clone()) for start in starts]
            optimizer = rarefy.AdamW(ps)
            for _ in range(3):
                for p, grad in zip(ps, grads, strict=True):
                    p.grad = grad
                optimizer.step()
            found.append(torch.cat([p.detach() for p in ps]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    alone = []
    for start, grad in zip(starts, grads, strict=True):
        p = nn.Parameter(start.clone())
        optimizer = rarefy.AdamW([p])
        for _ in range(3):
            p.grad = grad
            optimizer.step()
        alone.append(p.detach())
    assert torch.equal(torch.cat(alone), found[0])


def test_a_step_counts_as_a_write():
    """Autograd refuses a backward pass through what an optimizer has changed since."""
    p = nn.Parameter(torch.ones(8))
    loss = (p**2).sum()
    p.grad = torch.ones(8)
    rarefy.AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
