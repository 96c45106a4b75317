"""SμPar: first weights and rates by width and density (rule 3.3), and the coordinate check that shows what for."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy import Plan, SparseLinear, Static, SuPar, param_groups, sparsify
from rarefy.models import GPT, GPTConfig
from rarefy.models.generate import generate
from rarefy.recipes.text.networks import make_dense, make_sparse
from tiny import settings, write_text

pytestmark = pytest.mark.filterwarnings("ignore::rarefy.GuardWarning")

BASE = 32


def gpt(width: int, density: float, *, mup: bool, seed: int = 0) -> GPT:
    """Heads of eight features, so that wider means more of them."""
    config = GPTConfig(width=width, layers=2, heads=width // 8, context=16, base_width=BASE if mup else None)
    model = GPT(config, torch.Generator().manual_seed(seed))
    if density < 1:
        sparsify(model, Plan(density=density, method=Static(), keep_dense=("head",), seed=seed))
    return model


def rates(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Parameter name -> lr, weight decay."""
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("width, density", [(32, 1.0), (64, 1.0), (64, 0.25), (128, 0.1)])
def test_rule_3_3_rates_go_with_one_over_width_times_density(width, density):
    model = gpt(width, density, mup=True)
    supar = model.config.supar()
    assert supar is not None
    found = rates(model, param_groups(model, lr=0.01, weight_decay=0.1, mup=supar))
    m_d = width / BASE
    for name, (lr, decay) in found.items():
        if name == "head.weight":
            m = m_d
        elif name.endswith(".values") or (name.endswith(".weight") and "blocks" in name and "norm" not in name):
            layer = model.get_submodule(name.rpartition(".")[0])
            m = m_d * (layer.density if isinstance(layer, SparseLinear) else 1.0)
        else:
            assert (lr, decay) == (0.01, 0.0), name
            continue
        assert lr == pytest.approx(0.01 / m) and lr * decay == pytest.approx(0.01 * 0.1), name
    plain = rates(model, param_groups(model, lr=0.01, weight_decay=0.1))
    assert {lr for lr, _ in plain.values()} == {0.01}
    assert (found == plain) == (width == BASE and density == 1.0)  # at the base they are the same


@pytest.mark.parametrize("width, density", [(64, 1.0), (128, 0.25), (256, 0.1)])
def test_rule_3_3_first_variance_goes_with_one_over_width_times_density(width, density):
    base, wide = gpt(BASE, 1.0, mup=True), gpt(width, density, mup=True)
    m_d = width / BASE
    for name in ("blocks.0.attention.qkv", "blocks.1.mlp.up", "blocks.1.mlp.down", "head"):
        ours, theirs = wide.get_submodule(name), base.get_submodule(name)
        weight = ours.values if isinstance(ours, SparseLinear) else ours.weight
        m = m_d**2 if name == "head" else m_d * (ours.density if isinstance(ours, SparseLinear) else 1.0)
        variance, wanted = float(weight.detach().var()), float(theirs.weight.detach().var()) / m  # type: ignore[union-attr]
        assert variance == pytest.approx(wanted, rel=0.12), name
    assert float(wide.embedding.weight.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_rule_3_3_init_of_any_model(density):
    """`SuPar.init_` on someone's own MLP: input layer, hidden layer, output layer."""
    model = nn.Sequential(nn.Linear(50, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    if density < 1:
        sparsify(model, Plan(density=density, method=Static(), keep_dense=("4",)))
    first = cast(nn.Linear, model.get_submodule("0"))
    bias = first.bias.detach().clone()
    SuPar(base_width=100, inputs=("0",), output=("4",)).init_(model, 0.1, generator=torch.Generator().manual_seed(1))
    layers = [cast(nn.Linear, model.get_submodule(name)) for name in ("0", "2", "4")]
    stds = [float((m.values if isinstance(m, SparseLinear) else m.weight).std()) for m in layers]
    assert stds == pytest.approx([0.1 / density**0.5, 0.1 / (4 * density) ** 0.5, 0.1 / 4], rel=0.05)
    assert torch.equal(cast(nn.Linear, model.get_submodule("0")).bias, bias)


def test_rule_3_3_rates_stay_when_a_rewire_changes_a_neurons_fan_in():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    rewirer = sparsify(model, Plan(density=0.2, method=rarefy.SET(interval=2, end=8)))
    groups = param_groups(model, lr=0.01, weight_decay=0.1, mup=SuPar(base_width=16))
    optimizer = rarefy.AdamW(groups)
    rewirer.attach(optimizer, total_steps=20)
    before = [group["lr"] for group in optimizer.param_groups]
    fan_in = torch.diff(rewirer.layers["0"].crow_indices).clone()
    for _ in range(8):
        model(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(torch.diff(rewirer.layers["0"].crow_indices), fan_in)
    assert [group["lr"] for group in optimizer.param_groups] == before
    fresh = param_groups(model, lr=0.01, weight_decay=0.1, mup=SuPar(base_width=16))
    assert [group["lr"] for group in fresh] == before


def change(width: int, density: float, *, mup: bool, steps: int = 8, lr: float = 0.01) -> float:
    """Root mean square of how far the features before the last norm moved in some Adam steps; mean of three seeds."""
    moved = []
    for seed in range(3):
        model = gpt(width, density, mup=mup, seed=seed)
        supar = model.config.supar()
        optimizer = torch.optim.AdamW(param_groups(model, lr=lr, weight_decay=0.0, mup=supar))
        tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(seed))
        seen: list[torch.Tensor] = []
        hook = model.get_submodule("norm").register_forward_hook(
            lambda _, inputs, __, seen=seen: seen.append(inputs[0].detach())  # pyright: ignore
        )
        for _ in range(steps + 1):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        hook.remove()
        moved.append(float((seen[-1] - seen[0]).pow(2).mean().sqrt()))
    return sum(moved) / len(moved)


def test_rule_3_3_coordinate_check_features_move_alike_at_every_width_and_density():
    """With SμPar within a third of the base's; with one rate for all, more than twice as far at four times the width,
    and less far the sparser.
    """
    base = change(BASE, 1.0, mup=True)
    for width, density in ((128, 1.0), (128, 0.25), (128, 0.1)):
        assert change(width, density, mup=True) == pytest.approx(base, rel=0.35), (width, density)
    usual = change(BASE, 1.0, mup=False)
    assert usual == pytest.approx(base)
    assert change(128, 1.0, mup=False) > 2 * usual


def test_scores_of_wider_heads_are_scaled_by_one_over_their_size():
    """With as many features a head as the base nothing changes; with four times as many scores are halved."""
    config: dict[str, Any] = dict(width=32, layers=1, heads=2, context=8)
    torch.manual_seed(0)
    plain, same = GPT(GPTConfig(**config)), GPT(GPTConfig(**config, base_head=16))
    halved, narrow = GPT(GPTConfig(**config, base_head=4)), GPT(GPTConfig(**config))
    for model in (same, halved, narrow):
        model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        qkv = cast(nn.Linear, narrow.get_submodule("blocks.0.attention.qkv"))
        for part in (qkv.weight, qkv.bias):
            part[:32] /= 2
    tokens = torch.randint(256, (2, 8))
    torch.testing.assert_close(same(tokens), plain(tokens))
    torch.testing.assert_close(halved(tokens), narrow(tokens))
    assert not torch.allclose(halved(tokens), plain(tokens))
    assert generate(halved, b"abc", 4, seed=1) == generate(narrow, b"abc", 4, seed=1)  # with keys and values kept


def test_bad_bases():
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        SuPar(base_width=0)
    with pytest.raises(ValueError, match=r"base_density must lie in \(0, 1\], got 2"):
        SuPar(base_width=8, base_density=2)
    with pytest.raises(ValueError, match="base_width must be at least 1, got 0"):
        GPTConfig(base_width=0)


# -- text runs --------------------------------------------------------------------------------------------------------


def test_a_text_run_takes_its_rates_from_the_base(tmp_path):
    given = settings(write_text(tmp_path / "text.txt"), parametrization="mup", base_width=16, lr=0.01).settled(12)
    assert given.sparse_lr is None and given.dense_lr == 0.01
    sparse, dense = make_sparse(given, given.plan), make_dense(given)
    found = rates(sparse.model, sparse.optimizer.param_groups)
    layer = sparse.model.get_submodule("blocks.0.mlp.down")
    assert isinstance(layer, SparseLinear)
    assert found["blocks.0.mlp.down.values"][0] == pytest.approx(0.01 / (2 * layer.density))
    assert found["head.weight"][0] == pytest.approx(0.005) and found["embedding.weight"][0] == 0.01
    assert rates(dense.model, dense.optimizer.param_groups)["blocks.0.mlp.down.weight"][0] == pytest.approx(0.005)
    plain = settings(write_text(tmp_path / "text.txt"))
    assert plain.gpt().base_width is None and plain.settled(12).sparse_lr is not None


def test_two_ways_to_say_the_sparse_rate_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sparse_lr .* and parametrization mup both say"):
        settings(write_text(tmp_path / "text.txt"), parametrization="mup", sparse_lr=0.1)
