"""Two units in every four: first patterns, plans, and products by torch's kernels, which stand-ins take the place of
where there is no GPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy import SET, Linear, Pattern, Plan, SparseLinear, Static, sparsify
from rarefy.bench.gpu import sparse_in_fours
from rarefy.init import drawn_pattern, two_four_pattern
from rarefy.nn.mlp import mlp
from rarefy.ops import Index, backend, reference, tiled, triton, two_four, using

HALVES = [torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter")
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or two_four.why_not(torch.device("cuda")) is not None,
    reason="needs a GPU, triton and a torch with cuSPARSELt",
)


def drawn(rows: int, cols: int, seed: int = 0) -> Pattern:
    return two_four_pattern((rows, cols), rows * cols // 2, generator=torch.Generator().manual_seed(seed))


# -- patterns ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 100))
def test_every_four_of_a_row_and_of_a_column_has_two(rows, cols, seed):
    mask = drawn(4 * rows, 4 * cols, seed).to_mask()
    assert (mask.view(4 * rows, cols, 4).sum(2) == 2).all()
    assert (mask.view(rows, 4, 4 * cols).sum(1) == 2).all()


def test_all_ninety_tiles_come_about_equally_often():
    mask = drawn(400, 360).to_mask()
    tiles = mask.view(100, 4, 90, 4).transpose(1, 2).reshape(-1, 16)
    seen = Counter(map(tuple, tiles.tolist()))
    assert len(seen) == 90 and min(seen.values()) > 60 and max(seen.values()) < 150  # 100 each; 10 is the deviation


def test_follows_from_the_generator():
    assert drawn(32, 64, 1) == drawn(32, 64, 1) != drawn(32, 64, 2)
    by_name = drawn_pattern("two_four", (32, 64), 1024, generator=torch.Generator().manual_seed(1))
    assert by_name == drawn(32, 64, 1)


@pytest.mark.parametrize("shape, units, block", [((8, 8), 31, 1), ((6, 8), 24, 1), ((8, 6), 24, 1), ((16, 16), 8, 4)])
def test_other_sizes_are_refused(shape, units, block):
    with pytest.raises(ValueError, match="two in four"):
        two_four_pattern(shape, units, block)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_draws_them_and_leaves_dense_what_does_not_fit(tmp_path):
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))
    plan = Plan(density=0.5, init="two_four", method=Static())
    (tmp_path / "plan.yaml").write_text("density: 0.5\ninit: two_four\nmethod: {name: static}\n")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == plan
    rewirer = sparsify(model, plan)
    layer = model[0]
    assert isinstance(layer, SparseLinear) and isinstance(model[1], nn.Linear)
    assert two_four.by_row(layer.index) and two_four.by_column(layer.index)
    assert "multiples of 4" in rewirer.left_dense["1"]
    drawn_later = sparsify(nn.Sequential(nn.Linear(32, 64, device="meta")), plan).layers["0"]
    drawn_later.to_empty(device="cpu").reset_parameters()
    assert two_four.by_row(drawn_later.index)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"density": 0.4}, "half of the single units"),
        ({"density": Linear(start=0.6, stop=0.5)}, "half of the single units"),
        ({"overrides": {"0": 0.25}}, "half of the single units"),
        ({"block": 4}, "half of the single units"),
        ({"block": "auto"}, "half of the single units"),
        ({"block_overrides": {"0": (4, 1)}}, "half of the single units"),
        ({"distribution": "erk"}, "half of the single units"),
        ({"method": SET()}, "Static"),
        ({"low_rank": 2}, "Static"),
        ({"balance": {"0": 2}}, "Static"),
    ],
)
def test_what_would_not_keep_them_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Plan(**{"density": 0.5, "init": "two_four", "method": Static(), **wrong})


# -- which patterns are taken ------------------------------------------------------------------------------------------


def broken(pattern: Pattern, row: int = 3) -> Pattern:
    """One unit moved along its row, into a four that then has three."""
    mask = pattern.to_mask()
    here, there = mask[row, :4].nonzero()[0], 4 + (~mask[row, 4:8]).nonzero()[0]
    mask[row, here], mask[row, there] = False, True
    return Pattern.from_mask(mask)


def test_a_pattern_is_looked_at_by_rows_and_by_columns():
    whole = Index.of(drawn(32, 48))
    assert two_four.by_row(whole) and two_four.by_column(whole)
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[:, ::2] = True
    rows_only = Index.of(Pattern.from_mask(mask))
    assert two_four.by_row(rows_only) and not two_four.by_column(rows_only)
    assert not two_four.by_row(Index.of(broken(drawn(32, 48))))
    half_of_the_rows = torch.zeros(32, 48, dtype=torch.bool)
    half_of_the_rows[:16] = True
    assert not two_four.by_row(Index.of(Pattern.from_mask(half_of_the_rows)))
    for pattern in (drawn(32, 24), drawn(8, 48), Pattern.random((32, 48), 0.4), Pattern.random((32, 48), 0.5, 4)):
        assert not two_four.may_be(Index.of(pattern))
    assert not two_four.may_be(Index.of(drawn(32, 48), by_column=False))


def test_another_pattern_in_the_same_memory_is_looked_at_anew():
    layer = SparseLinear.from_pattern(drawn(32, 48))
    assert two_four.by_row(layer.index)
    layer.set_pattern(broken(layer.pattern))
    assert not two_four.by_row(layer.index)
    layer.set_pattern(drawn(32, 48, 5))
    assert two_four.by_row(layer.index)


def test_where_torch_has_no_kernels_the_fallback_runs(monkeypatch):
    layer = SparseLinear.from_pattern(drawn(32, 48))
    assert "GPU" in str(two_four.why_not(torch.device("cpu")))
    monkeypatch.setattr(triton, "usable", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "cuSPARSELt" in str(two_four.why_not(torch.device("cuda")))
    monkeypatch.setattr(backend, "_told", set())
    with pytest.warns(UserWarning, match="plain torch"):
        assert backend.choose(torch.float32, torch.device("cuda"), [1, 1], layer.index) is tiled


# -- products ---------------------------------------------------------------------------------------------------------


class StandIn:
    """torch's two kernels in plain torch: opaque to the caller, and as strict as their own descriptions."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def compress(self, dense: Tensor) -> Tensor:
        assert dense.is_contiguous() and dense.dtype in HALVES
        assert all(side % two_four.SIDE == 0 for side in dense.shape)
        assert ((dense.view(dense.shape[0], -1, 4) != 0).sum(2) <= 2).all(), "not two in four: the rest would be lost"
        self.calls["compress"] += 1
        return dense.clone()

    def product(self, compressed: Tensor, dense: Tensor, bias: Tensor | None, *, transpose_result: bool) -> Tensor:
        assert dense.dtype == compressed.dtype and (bias is None or bias.dtype == dense.dtype)
        assert transpose_result and dense.T.is_contiguous() and dense.shape[1] % 8 == 0
        on_meta = (compressed.to("meta"), dense.to("meta"), None if bias is None else bias.to("meta"))
        described = torch.ops.aten._cslt_sparse_mm(*on_meta, transpose_result=True)
        self.calls["product"] += 1
        y = dense.T.float() @ compressed.float().T + (0 if bias is None else bias.float())
        assert described.shape == y.shape and described.dtype == dense.dtype
        return y.to(dense.dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The products on this machine, by a stand-in, and a count of its calls."""
    from rarefy.ops.triton import two_four as products

    stand_in = StandIn()
    monkeypatch.setattr(two_four, "why_not", lambda device: None)
    monkeypatch.setattr(products, "_compress", stand_in.compress)
    monkeypatch.setattr(products, "_multiply", stand_in.product)
    with using("triton"):
        yield stand_in.calls


def of_layer(tokens: int, dtype: torch.dtype, bias: bool, device: str = "cpu") -> tuple[SparseLinear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    layer = SparseLinear.from_pattern(drawn(32, 48, tokens), bias, generator=generator)
    x = torch.randn(tokens, 48, generator=generator).to(dtype).to(device)
    return layer.to(device), x.requires_grad_(), torch.randn(tokens, 32, generator=generator).to(dtype).to(device)


def check(layer: SparseLinear, x: Tensor, dy: Tensor) -> None:
    """Forward and all gradients against float64, within rounding of the factors' dtype."""
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    assert y.dtype == x.dtype and x.grad is not None and x.grad.dtype == x.dtype
    values = layer.values.detach().to(x.dtype).double().cpu()
    weight = reference.dense(values, Index.of(layer.pattern.to("cpu")))
    wide_x, wide_dy = x.detach().double().cpu(), dy.double().cpu()
    eps = torch.finfo(x.dtype).eps
    exact = wide_x @ weight.T
    if layer.bias is not None:
        exact = exact + layer.bias.detach().to(x.dtype).double().cpu()
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad.double().cpu(), wide_dy.sum(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y.detach().double().cpu(), exact, rtol=eps, atol=1e-4)
    torch.testing.assert_close(x.grad.double().cpu(), wide_dy @ weight, rtol=eps, atol=1e-4)
    assert layer.values.grad is not None and layer.values.grad.dtype == torch.float32
    found = reference.dense(layer.values.grad.double().cpu(), Index.of(layer.pattern.to("cpu")))
    torch.testing.assert_close(found, (wide_dy.T @ wide_x) * (weight != 0), rtol=eps, atol=1e-4)
    x.grad = None


@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 37])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_are_those_of_the_dense_matrix(kernels, dtype, tokens, bias):
    check(*of_layer(tokens, dtype, bias))
    assert kernels == {"compress": 2, "product": 2}  # forward, and the input's gradient


@interpreted
def test_no_tokens_ask_for_no_product(kernels):
    layer, x, dy = of_layer(0, torch.bfloat16, True)
    y = layer(x)
    y.backward(dy)
    assert y.shape == (0, 32) and x.grad is not None and x.grad.shape == (0, 48) and not kernels["product"]
    assert layer.values.grad is not None and not layer.values.grad.any()


@interpreted
def test_columns_of_other_counts_have_a_dense_input_gradient(kernels):
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[:, ::2] = True
    _, x, dy = of_layer(8, torch.bfloat16, True)
    check(SparseLinear.from_pattern(Pattern.from_mask(mask)), x, dy)
    assert kernels == {"compress": 1, "product": 1}


@interpreted
def test_fp32_activations_are_multiplied_dense(kernels):
    layer, x, _ = of_layer(8, torch.float32, False)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T, rtol=1e-5, atol=1e-5)
    assert not kernels["product"]


@interpreted
def test_a_pattern_of_another_kind_is_not_taken(kernels):
    layer, x, _ = of_layer(8, torch.bfloat16, True)
    layer.set_pattern(broken(layer.pattern))
    with pytest.raises(ValueError, match="no Triton kernel for blocks of 1x1"):
        layer(x)
    assert not kernels["compress"]


@interpreted
def test_an_mlp_of_them_is_composed_of_such_products(kernels):
    up, down = (SparseLinear.from_pattern(drawn(*shape)) for shape in ((64, 32), (32, 64)))
    x = torch.randn(16, 32).bfloat16()
    expected = down(up(x).relu())
    kernels.clear()
    y = mlp(x, up, "relu", down)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert kernels["product"] == 2
    y.sum().backward()
    assert kernels["product"] == 3 and up.values.grad is not None and up.values.grad.any()  # x needs no gradient


@interpreted
def test_the_bench_times_them_as_a_contender_of_its_own(kernels):
    x, dy = torch.randn(16, 48), torch.randn(16, 32)
    assert sparse_in_fours((32, 40), x, dy) == []
    (found,) = sparse_in_fours((32, 48), x, dy)
    assert (found.name, found.kernels, found.dtype, found.density) == ("rarefy 2:4", "cuSPARSELt", "bf16", 0.5)
    assert found.flops == 6 * 16 * 32 * 24
    for lap in found.laps.values():
        lap()
    assert kernels == {"compress": 3, "product": 3}  # forward, backward and dx; dw is dense


@on_gpu
@pytest.mark.parametrize("tokens", [1, 8, 37, 512])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_on_a_gpu(dtype, tokens):
    layer, x, dy = of_layer(tokens, dtype, True, "cuda")
    check(layer, x.detach().requires_grad_(), dy)


@on_gpu
def test_a_captured_graph_stays_right_across_patterns():
    layer, x, _ = of_layer(64, torch.bfloat16, True, "cuda")
    x = x.detach()
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.set_pattern(drawn(32, 48, 99).to("cuda"))
        graph.replay()
        torch.testing.assert_close(y, copy.deepcopy(layer)(x))
