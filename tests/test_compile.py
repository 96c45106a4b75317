"""torch.compile: one graph before and after rewires, the same numbers, the same rewires."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rarefy import (
    GMP,
    SET,
    Constant,
    Exact,
    GraNet,
    Momentum,
    NormProduct,
    Plan,
    Rewirer,
    RigL,
    SampledTokens,
    SparseLinear,
    sparsify,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 32), nn.LayerNorm(32), nn.Linear(32, 16))


def build(method, block=1, optimizer=torch.optim.AdamW) -> tuple[nn.Module, Rewirer, torch.optim.Optimizer]:
    model = network()
    rewirer = sparsify(model, Plan(density=0.3, method=method, block=block))
    made = optimizer(model.parameters(), lr=0.01)
    return model, rewirer.attach(made, total_steps=100), made


def train(run, optimizer: torch.optim.Optimizer, *, micro_batches: int = 1, autocast: bool = False) -> list[float]:
    losses = []
    for at in range(8):
        for part in torch.randn(micro_batches, 4, 16, generator=torch.Generator().manual_seed(at)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = (run(part).float() - part).pow(2).mean() / micro_batches
            loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


METHODS = {
    "RigL": RigL(interval=2, end=90, fraction=Constant(0.3), signal=Exact()),
    "RigL-tokens": RigL(interval=2, end=90, fraction=Constant(0.3), signal=SampledTokens(tokens=3)),
    "RigL-norms": RigL(interval=2, end=90, fraction=Constant(0.3), signal=NormProduct()),
    "RigL-momentum": RigL(interval=2, end=90, fraction=Constant(0.3), signal=Momentum(source=NormProduct())),
    "RigL-may-return": RigL(interval=2, end=90, fraction=Constant(0.3), may_return=True, stagger=False),
    "SET": SET(interval=2, end=90, fraction=Constant(0.3)),
}


@pytest.mark.parametrize("method", [GMP(interval=3, end=7), GraNet(interval=3, end=7)], ids=["GMP", "GraNet"])
def test_other_sizes_compile_again_and_every_bit_is_that_of_eager_mode(method):
    model, rewirer, optimizer = build(method)
    counter = CompileCounterWithBackend("aot_eager")
    losses = train(torch.compile(model, backend=counter, fullgraph=True), optimizer)
    plain, _, its_optimizer = build(method)
    assert losses == train(plain, its_optimizer)
    assert 1 < counter.frame_count <= 4
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert sum(layer.num_units for layer in rewirer.layers.values()) == round(0.3 * (16 * 48 + 48 * 32 + 32 * 16))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_one_graph_through_many_rewires(name, block, micro_batches):
    """fullgraph, nothing recompiles, and every bit of the run is what it is in eager mode."""
    model, rewirer, optimizer = build(METHODS[name], block)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = train(compiled, optimizer, micro_batches=micro_batches)
    assert counter.frame_count == 1, "one compilation, one graph"
    assert len(rewirer.history) >= 9 and rewirer.skipped == 0
    plain, its_rewirer, its_optimizer = build(METHODS[name], block)
    assert losses == train(plain, its_optimizer, micro_batches=micro_batches)
    assert [(r["step"], r["layer"], r["changed"]) for r in rewirer.history] == [
        (r["step"], r["layer"], r["changed"]) for r in its_rewirer.history
    ]
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_nothing_breaks_the_graph():
    model, _, _ = build(METHODS["RigL"])
    explanation = torch._dynamo.explain(model)(torch.randn(4, 16))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_one_graph_under_autocast():
    model, rewirer, optimizer = build(METHODS["RigL"])
    counter = CompileCounterWithBackend("aot_eager")
    losses = train(torch.compile(model, backend=counter, fullgraph=True), optimizer, autocast=True)
    plain, its_rewirer, its_optimizer = build(METHODS["RigL"])
    assert losses == pytest.approx(train(plain, its_optimizer, autocast=True), rel=0.02)
    assert counter.frame_count == 1 and len(rewirer.history) == len(its_rewirer.history) >= 9


def test_batches_of_other_sizes_compile_as_often_as_for_a_dense_model():
    counts = []
    for sparse in (False, True):
        torch._dynamo.reset()
        model = network()
        if sparse:
            sparsify(model, Plan(density=0.3))
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for batch in (4, 7, 12, 5, 9):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(compiled(x), model(x))
            compiled(x).sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] <= 2


def test_a_layer_used_twice_in_one_graph():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SparseLinear(12, 12, density=0.3, generator=torch.Generator().manual_seed(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    chosen = []
    for compiles in (False, True):
        model = Twice()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rewirer = Rewirer({"layer": model.layer}, RigL(interval=1, end=9, fraction=Constant(0.3))).attach(optimizer)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        for at in range(5):
            run(torch.randn(3, 12, generator=torch.Generator().manual_seed(at))).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(rewirer.history) == 5 and rewirer.skipped == 0
        chosen.append(model.layer.pattern)
    assert chosen[0] == chosen[1]


def test_copies_and_loaded_states_need_no_new_graph():
    model, _, _ = build(METHODS["SET"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 16)
    compiled(x)
    other = copy.deepcopy(model.state_dict())
    for key, tensor in other.items():
        if key.endswith("values"):
            tensor.mul_(2)
    model.load_state_dict(other)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_compiled_optimizer_step_rewires(name):
    """The hooks run in eager mode around it; the counts are those of the plain step."""
    model, rewirer, optimizer = build(METHODS["RigL"], optimizer=getattr(torch.optim, name))

    @torch.compile(backend="aot_eager")
    def step() -> None:
        optimizer.step()

    for at in range(6):
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(at))).pow(2).mean().backward()
        step()
        optimizer.zero_grad()
    assert rewirer.t == 6 and len(rewirer.history) >= 6


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
@pytest.mark.parametrize("name", ["RigL", "SET"])
def test_inductor(name):
    """Its fused kernels round differently, so losses are close; the graph is one, and the engine is not skipped."""
    model, rewirer, optimizer = build(METHODS[name])
    counter = CompileCounterWithBackend("inductor")
    losses = train(torch.compile(model, backend=counter, fullgraph=True), optimizer)
    plain, its_rewirer, its_optimizer = build(METHODS[name])
    assert losses == pytest.approx(train(plain, its_optimizer), rel=1e-3)
    assert counter.frame_count == 1 and rewirer.skipped == 0
    assert len(rewirer.history) == len(its_rewirer.history) >= 9
