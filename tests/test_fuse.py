"""fuse: which MLPs of other people's models run as one call, and that nothing else about them changes."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import Plan, Rewirer, SparseLinear, sparsify
from rarefy.fuse import FusedMLP, activation_of
from rarefy.models import GPT, GPTConfig
from rarefy.nn import SquaredReLU
from rarefy.ops.mlp import activate

transformers = pytest.importorskip("transformers")
from transformers import activations  # noqa: E402

WIDTH, HIDDEN = 16, 48


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that fused modules ran."""
    module, seen = sys.modules["rarefy.nn.mlp"], []
    run = module._fused

    def counted(op: str, *given: Any) -> Tensor:
        seen.append(op)
        return run(op, *given)

    monkeypatch.setattr(module, "_fused", counted)
    return seen


class Plain(nn.Module):
    """An MLP as people write it; `body` is its forward."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], act: nn.Module | None = None, p: float = 0.5) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act, self.drop = act or nn.GELU(), nn.Dropout(p)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Gated(Plain):
    def __init__(self, body: Callable[[Any, Tensor], Tensor], **given: Any) -> None:
        super().__init__(body, **given)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)


def llama(bias: bool = False) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(
        transformers.LlamaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_attention_heads=2, mlp_bias=bias)
    )


def gpt2(p: float = 0.1) -> nn.Module:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    return GPT2MLP(HIDDEN, transformers.GPT2Config(n_embd=WIDTH, n_head=2, resid_pdrop=p))


def gemma() -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaMLP

    config = transformers.GemmaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, hidden_act="gelu_pytorch_tanh")
    return GemmaMLP(config)


def qwen2() -> nn.Module:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    return Qwen2MLP(transformers.Qwen2Config(hidden_size=WIDTH, intermediate_size=HIDDEN))


def mistral() -> nn.Module:
    from transformers.models.mistral.modeling_mistral import MistralMLP

    return MistralMLP(transformers.MistralConfig(hidden_size=WIDTH, intermediate_size=HIDDEN))


class Vit(nn.Module):
    """As in timm: dropout and Identity between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


def sequential(*between: nn.Module, before: tuple = (), after: tuple = ()) -> nn.Sequential:
    return nn.Sequential(*before, nn.Linear(WIDTH, HIDDEN), *between, nn.Linear(HIDDEN, WIDTH), *after)


FUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (gpt2, "mlp"),
    "llama": (llama, "gated_mlp"),
    "llama with bias": (lambda: llama(True), "gated_mlp"),
    "gemma": (gemma, "gated_mlp"),
    "qwen2": (qwen2, "gated_mlp"),
    "mistral": (mistral, "gated_mlp"),
    "vit": (Vit, "mlp"),
    "own": (lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x)))), "mlp"),
    "function": (lambda: Plain(lambda m, x: m.fc2(F.gelu(m.fc1(x), approximate="tanh"))), "mlp"),
    "silu": (lambda: Plain(lambda m, x: m.fc2(F.silu(m.fc1(x)))), "mlp"),
    "relu": (lambda: Plain(lambda m, x: m.drop(m.fc2(torch.relu(m.fc1(x))))), "mlp"),
    "no dropout": (lambda: Plain(lambda m, x: m.fc2(m.drop(m.act(m.fc1(x)))), p=0.0), "mlp"),
    "gate last": (lambda: Gated(lambda m, x: m.fc2(m.fc1(x) * m.act(m.gate(x)))), "gated_mlp"),
    "torch.mul": (lambda: Gated(lambda m, x: m.fc2(torch.mul(F.silu(m.gate(x)), m.fc1(x)))), "gated_mlp"),
    "sequential": (lambda: sequential(nn.ReLU()), "mlp"),
    "longer": (
        lambda: sequential(nn.GELU(), nn.Dropout(0.0), before=(nn.LayerNorm(WIDTH),), after=(nn.Tanh(),)),
        "mlp",
    ),
}
APART: dict[str, Callable[[], nn.Module]] = {
    "another activation": lambda: Plain(lambda m, x: m.fc2(torch.tanh(m.fc1(x)))),
    "quick gelu": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x))), activations.QuickGELUActivation()),
    "subclass of an activation": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x))), type("Mine", (nn.GELU,), {})()),
    "residual": lambda: Plain(lambda m, x: x + m.fc2(m.act(m.fc1(x)))),
    "scaled": lambda: Plain(lambda m, x: 2 * m.fc2(m.act(m.fc1(x)))),
    "scaled inside": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x)) * 0.5)),
    "used twice": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x))) + m.fc2(m.act(m.fc1(x)))),
    "functional dropout": lambda: Plain(lambda m, x: m.fc2(F.dropout(m.act(m.fc1(x)), 0.5, m.training))),
    "only in evaluation": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x) if m.training else m.fc1(x) * 2))),
    "keeps its input": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(setattr(m, "seen", x) or x)))),
    "data decides": lambda: Plain(lambda m, x: m.fc2(m.act(m.fc1(x))) if x.sum() > 0 else x),
    "gate without activation": lambda: Gated(lambda m, x: m.fc2(m.gate(x) * m.fc1(x))),
    "activation of the product": lambda: Gated(lambda m, x: m.fc2(m.act(m.gate(x) * m.fc1(x)))),
    "up of something else": lambda: Gated(lambda m, x: m.fc2(m.act(m.gate(x)) * m.fc1(2 * x))),
    "added": lambda: Gated(lambda m, x: m.fc2(m.act(m.gate(x)) + m.fc1(x))),
    "a third layer on the way": lambda: Gated(lambda m, x: m.fc2(m.act(m.fc1(x))) + m.fc2(m.gate(x))),
    "sequential with tanh": lambda: sequential(nn.Tanh()),
    "norm between": lambda: sequential(nn.GELU(), nn.LayerNorm(HIDDEN)),
    "no activation": lambda: sequential(),
}


def sparse(make: Callable[[], nn.Module], **plan: Any) -> tuple[nn.Module, nn.Module, Rewirer]:
    """The MLP fused, and a copy of it that calls its layers one by one."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": make()})
    rewirer = sparsify(model, Plan(density=0.4, **plan))
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, FusedMLP):
            module.__class__ = module.original  # type: ignore[assignment]
    return model["mlp"], apart["mlp"], rewirer


@pytest.mark.parametrize("name", FUSED)
def test_what_is_an_mlp_runs_as_one_call(name, calls):
    make, op = FUSED[name]
    model, apart, rewirer = sparse(make)
    x = torch.randn(3, 40, WIDTH)
    assert (
        rewirer.fused == ["mlp"] and isinstance(model, type(make())) and type(model).__name__ == type(make()).__name__
    )
    for mode in (True, False):
        for each in (model, apart):
            each.train(mode)
        found, grads = [], []
        for each in (model, apart):
            torch.manual_seed(1)
            at = x.clone().requires_grad_()
            y = each(at)
            y.pow(2).sum().backward()
            found.append(y.detach())
            grads.append([at.grad, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert calls == [op, op]
    assert list(model.state_dict()) == list(apart.state_dict()) and repr(model) == repr(apart)


@pytest.mark.parametrize("name", APART)
def test_what_is_not_for_sure_an_mlp_stays_as_it_is(name, calls):
    make = APART[name]
    model, apart, rewirer = sparse(make)
    assert rewirer.fused == [] and type(model) is type(apart) and not isinstance(model, FusedMLP)
    assert not hasattr(model, "seen")  # recognition leaves no trace
    for each in (model, apart):
        each.eval()
    x = torch.randn(70, WIDTH)
    assert torch.equal(model(x), apart(x)) and calls == []


@pytest.mark.parametrize("dense", ["mlp.fc1", "mlp.fc2"])
def test_a_layer_left_dense_leaves_the_mlp_apart(dense):
    _, _, rewirer = sparse(FUSED["own"][0], keep_dense=(dense,))
    assert rewirer.fused == [] and len(rewirer.layers) == 1


@pytest.mark.parametrize(
    "make",
    [lambda: Plain(lambda m, x: m.fc2(m.drop(m.act(m.fc1(x))))), lambda: sequential(nn.GELU(), nn.Dropout(0.5))],
    ids=["module", "sequential"],
)
def test_dropout_between_steps_aside_in_training_only(make, calls):
    model, apart, rewirer = sparse(make)
    x = torch.randn(70, WIDTH)
    assert rewirer.fused == ["mlp"]
    outputs = []
    for each in (model, apart):
        torch.manual_seed(3)
        outputs.append(each(x))
    assert torch.equal(*outputs) and calls == []
    for each in (model, apart):
        each.eval()
    torch.testing.assert_close(model(x), apart(x))
    assert calls == ["mlp"]


def test_three_layers_in_a_sequential(calls):
    model, apart, _ = sparse(
        lambda: nn.Sequential(
            *(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24), nn.SiLU()),
            *(nn.Linear(24, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)),
        )
    )
    x = torch.randn(70, WIDTH)
    torch.testing.assert_close(model(x), apart(x))
    assert calls == ["mlp"] * 3


def test_a_sequential_may_be_sliced_and_changed(calls):
    model: Any
    model, apart, _ = sparse(lambda: sequential(nn.ReLU()))
    x = torch.randn(70, WIDTH)
    torch.testing.assert_close(model[:2](x), torch.relu(apart[0](x)))  # type: ignore[index]
    assert calls == []
    model[1] = nn.Tanh()
    torch.testing.assert_close(model(x), apart[2](torch.tanh(apart[0](x))))  # type: ignore[index]
    assert calls == []


def test_a_changed_module_does_what_it_became(calls):
    model: Any
    model, _, _ = sparse(FUSED["own"][0])
    x = torch.randn(70, WIDTH)
    model.act = nn.Tanh()
    torch.testing.assert_close(model(x), model.fc2(torch.tanh(model.fc1(x))))
    model.act, model.fc2 = nn.ReLU(), model.fc2.to_dense()
    torch.testing.assert_close(model(x), model.fc2(torch.relu(model.fc1(x))))
    assert calls == []


@pytest.mark.parametrize("name", ["own", "llama", "sequential", "vit"])
def test_hooks_on_any_part_run(name, calls):
    model, _, _ = sparse(FUSED[name][0])
    x = torch.randn(70, WIDTH)
    whole = model(x)
    for child in model.children():
        seen: list[nn.Module] = []
        handle = child.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        torch.testing.assert_close(model(x), whole)
        handle.remove()
        if name != "own" or not isinstance(child, nn.Dropout):  # which that one never calls
            assert seen == [child]
    seen = []
    with_hook = model.register_forward_hook(lambda module, *_: seen.append(module))
    calls.clear()
    model(x)
    with_hook.remove()
    assert seen == [model] and len(calls) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "sequential"])
def test_copies_pickles_and_keywords(name, calls):
    model, apart, _ = sparse(FUSED[name][0])
    for each in (model, apart):
        each.eval()
    x = torch.randn(70, WIDTH)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    apart.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert type(twin) is type(model) and torch.equal(twin(x), model(x)) and len(calls) == 2
    twin = copy.deepcopy(model)
    next(twin.parameters()).data.zero_()
    assert not torch.equal(twin(x), model(x))  # a copy runs its own layers
    if name == "gpt2":
        calls.clear()
        torch.testing.assert_close(model(hidden_states=x), model(x))
        assert len(calls) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "longer"])
def test_compiles_to_one_graph(name):
    model, apart, _ = sparse(FUSED[name][0])
    for each in (model, apart):
        each.eval()
    x = torch.randn(70, WIDTH)
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), apart(x))
        compiled(x).sum().backward()
    finally:
        torch._dynamo.reset()


def test_sparsify_again_lists_what_is_fused():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": FUSED["own"][0](), "b": llama()})
    assert sparsify(model, Plan(density=0.4, include=("a.*",))).fused == ["a"]
    assert sparsify(model, Plan(density=0.4)).fused == ["a", "b"]


def test_a_model_on_the_meta_device_is_recognised(calls):
    with torch.device("meta"):
        model = nn.ModuleDict({"mlp": llama()})
    rewirer = sparsify(model, Plan(density=0.4))
    model.to_empty(device="cpu")
    for layer in rewirer.layers.values():
        layer.reset_parameters()
    model["mlp"](torch.randn(70, WIDTH))
    assert rewirer.fused == ["mlp"] and calls == ["gated_mlp"]


def test_our_own_gpt(calls):
    model = GPT(GPTConfig(width=32, layers=2, heads=4, context=64))
    rewirer = sparsify(model, Plan(density=0.3))
    model(torch.randint(256, (2, 64)))
    assert rewirer.fused == ["blocks.0.mlp", "blocks.1.mlp"] and calls == ["mlp", "mlp"]


def test_fresh_sparse_layers_are_fused_only_where_asked():
    layer = SparseLinear(4, 4, density=0.5)
    assert not isinstance(nn.Sequential(layer, nn.ReLU(), layer), FusedMLP)


@pytest.mark.parametrize(
    "module",
    [
        *(nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU(), SquaredReLU()),
        *(
            activations.ACT2FN[name]
            for name in ("gelu", "gelu_new", "gelu_fast", "gelu_python", "silu", "relu", "relu2")
        ),
        *(activations.ACT2FN[name] for name in ("gelu_pytorch_tanh", "gelu_python_tanh")),
    ],
    ids=lambda module: repr(module),
)
def test_activations_are_what_they_are_taken_for(module):
    name, z = activation_of(module), torch.linspace(-12, 12, 999, dtype=torch.float64)
    assert name is not None
    torch.testing.assert_close(activate(z, name), module(z), rtol=1e-6, atol=1e-7)
