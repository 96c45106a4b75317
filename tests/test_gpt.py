"""The model: shapes, causality, first weights, generation, and what a plan makes of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import rarefy
from rarefy import Plan, RigL, sparsify
from rarefy.models import GPT, GPTConfig
from rarefy.nn import SparseLinear
from rarefy.ops import rotary_table

TINY = GPTConfig(width=32, layers=2, heads=4, context=16)
LEARNED = dataclasses.replace(TINY, positions="learned", token_shift=False)
KINDS = [
    TINY,
    dataclasses.replace(TINY, activation="gelu"),
    LEARNED,
    dataclasses.replace(TINY, token_shift=False),
    dataclasses.replace(TINY, positions="learned"),
    dataclasses.replace(TINY, attention=16),
]
every_kind = pytest.mark.parametrize(
    "config", KINDS, ids=lambda c: f"{c.positions}-{c.activation}-{c.token_shift}-{c.attended}"
)


def test_each_position_predicts_a_byte():
    assert GPT(TINY)(torch.zeros(3, 7, dtype=torch.int64)).shape == (3, 7, 256)


@every_kind
def test_a_prediction_sees_nothing_that_comes_later(config):
    model = GPT(config)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] += 1 - 2 * (changed[0, 9] == 255).long()

    before, after = model(tokens), model(changed)

    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


@every_kind
def test_a_prediction_sees_everything_before_it(config):
    """One layer of attention and the shifts reach every byte; positions tell two orders of the same bytes apart."""
    model, tokens = GPT(config), torch.arange(16)[None]
    at_last = model(tokens)[0, -1]
    for place in (0, 8, 14):
        changed = tokens.clone()
        changed[0, place] = 200
        assert not torch.equal(model(changed)[0, -1], at_last)
    swapped = tokens.clone()
    swapped[0, [2, 9]] = swapped[0, [9, 2]]
    assert not torch.allclose(model(swapped)[0, -1], at_last, rtol=1e-5, atol=1e-6)


def test_with_rotary_positions_only_distances_count():
    """The same bytes after another beginning that attention does not look at: one byte repeated has one prediction."""
    model = GPT(dataclasses.replace(TINY, token_shift=False))
    logits = model(torch.full((1, 16), 7))
    torch.testing.assert_close(logits[0], logits[0, :1].expand(16, -1), rtol=1e-4, atol=1e-5)


def test_a_shift_reads_half_of_the_byte_before():
    model, seen = GPT(TINY), []
    block = model.get_submodule("blocks.0")
    block.get_submodule("attention").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block.get_submodule("attention_norm").register_forward_hook(lambda *given: seen.append(given[2]))
    model(torch.randint(256, (2, 16)))
    normed, read = seen
    assert torch.equal(read[..., :16], normed[..., :16])
    assert torch.equal(read[:, 1:, 16:], normed[:, :-1, 16:]) and not read[:, 0, 16:].any()


def test_a_cast_rounds_no_angles_and_a_model_leaves_the_meta_device_whole():
    wanted = rotary_table(TINY.context, TINY.head_dim)
    with torch.device("meta"):
        empty = GPT(TINY)
    for made in (GPT(TINY).to(torch.bfloat16), GPT(TINY).double(), empty.to_empty(device="cpu")):
        table = made.get_submodule("blocks.1.attention").get_buffer("rotary_Tc")
        assert table.dtype == torch.float32 and torch.equal(table, wanted)
    assert not any("rotary" in name for name in GPT(TINY).state_dict())
    assert GPT(TINY).to(torch.bfloat16)(torch.zeros(1, 5, dtype=torch.int64)).dtype == torch.bfloat16


def test_a_fresh_model_expects_every_byte_alike():
    tokens = torch.randint(256, (8, 17))
    logits = GPT(GPTConfig(width=128, layers=4, heads=4, context=16))(tokens[:, :-1])
    # The logits' spread is about 0.55 = 0.02 * sqrt(768), which adds half its square to log(256).
    assert F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() == pytest.approx(
        math.log(256), abs=0.35
    )


def test_what_writes_to_the_residual_path_starts_smaller():
    model = GPT(GPTConfig(width=128, layers=8, heads=4, context=16))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    usual = 0.02 * math.sqrt(768 / 128)
    for name in ("blocks.3.attention.qkv.weight", "blocks.3.mlp.up.weight", "head.weight"):
        assert std[name] == pytest.approx(usual, rel=0.05)
    for name in ("blocks.3.attention.out.weight", "blocks.3.mlp.down.weight"):
        assert std[name] == pytest.approx(usual / math.sqrt(2 * 8), rel=0.05)


def test_a_wider_mlp_writes_as_much():
    shape: dict[str, Any] = {"width": 64, "layers": 1, "heads": 2, "context": 4}
    x = torch.randn(4096, 64)
    usual, wide = (
        GPT(GPTConfig(**shape, mlp=mlp)).get_submodule("blocks.0.mlp")(x).std().item() for mlp in (None, 1024)
    )
    assert wide == pytest.approx(usual, rel=0.15)


@pytest.mark.parametrize("attention", [16, 192])
def test_attention_of_another_width_than_the_stream(attention):
    """Its own sizes, and it writes as much as attention of the stream's width does."""
    shape: dict[str, Any] = {"width": 64, "layers": 1, "heads": 2, "context": 8}
    usual, other = (GPT(GPTConfig(**shape, attention=a)).get_submodule("blocks.0.attention") for a in (None, attention))
    sizes = {name: tuple(p.shape) for name, p in other.named_parameters()}
    assert sizes["qkv.weight"] == (3 * attention, 64) and sizes["out.weight"] == (64, attention)
    x = torch.randn(512, 1, 64)  # a single key: what comes out is the value
    assert other(x).std().item() == pytest.approx(usual(x).std().item(), rel=0.15)
    config = GPTConfig(**shape, attention=attention)
    assert config.head_dim == attention // 2
    assert config.attention_flops() / GPTConfig(**shape).attention_flops() == attention / 64


def test_the_same_generator_draws_the_same_model():
    first, second = (GPT(TINY, torch.Generator().manual_seed(3)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"width": 30, "heads": 4}, "30 is no multiple of 4"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"mlp": 0}, "mlp must be at least 1, got 0"),
        ({"attention": 0}, "attention must be at least 1, got 0"),
        ({"attention": 30}, "the 4 heads must share the features of attention evenly, and 30 is no multiple of 4"),
        ({"attention": 36}, "36 / 4 = 9 has an odd one out"),
        ({"width": 36, "heads": 4}, "36 / 4 = 9 has an odd one out"),
        ({"activation": "tanh"}, "must be 'squared_relu' or 'gelu', got 'tanh'"),
        ({"positions": "sine"}, "must be 'rotary' or 'learned', got 'sine'"),
    ],
)
def test_an_impossible_shape_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)


def test_more_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 bytes are more than the context of 16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.int64))


def test_a_plan_finds_the_layers_by_name_and_leaves_the_head_dense():
    model = GPT(TINY)
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.25, keep_dense=("head",), overrides={"*.mlp.*": 0.5}))
    names = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]
    assert list(rewirer.layers) == names
    assert list(rewirer.left_dense) == ["head"]
    assert isinstance(model.get_submodule("blocks.1.mlp.up"), SparseLinear)
    assert rewirer.layers["blocks.1.mlp.up"].density == 0.5


@pytest.mark.parametrize("density", [None, 0.3])
def test_blocks_run_again_instead_of_being_kept(density):
    """The same loss and gradients, bit for bit; growth sees one backward call; nothing runs twice without gradients."""
    config = GPTConfig(width=32, layers=2, heads=2, context=16)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    found = {}
    for recompute in (False, True):
        model = GPT(config, torch.Generator().manual_seed(0))
        rewirer = None
        if density is not None:
            rewirer = sparsify(model, Plan(density=density, method=RigL(interval=1), keep_dense=("head",)))
            rewirer.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
        model.recompute = recompute
        runs = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, seen=runs: seen.append(1))
        loss = model(tokens).square().mean()
        loss.backward()
        assert len(runs) == (4 if recompute else 2)
        if rewirer is not None:
            assert [collector.calls for collector in rewirer._collectors.values()] == [1] * 8
        found[recompute] = [loss.detach(), *(p.grad for p in model.parameters())]
        with torch.no_grad():
            model(tokens)
        assert len(runs) == (6 if recompute else 4)
    for here, there in zip(*found.values(), strict=True):
        assert torch.equal(here, there)
