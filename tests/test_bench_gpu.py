"""The GPU's side of `rarefy bench`, on the CPU: kernels interpreted, graphs not captured, other libraries made up."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch
from rich.console import Console

from cases import scatter
from rarefy import Pattern
from rarefy.bench import Settings, timing
from rarefy.bench import gpu_peers as peers
from rarefy.bench.gpu import (
    dense_in_fp8,
    dense_on_gpu,
    kernels_on_gpu,
    peers_on_gpu,
    sparse_in_fp8,
    sparse_on_gpu,
)
from rarefy.bench.gpu_peers import GpuPeer, installed_for_gpu
from rarefy.cli.bench import Bench, name_of, wish
from rarefy.cli.bench_tables import show
from rarefy.cost import Lap
from rarefy.nn import SparseLinear
from rarefy.ops import triton, using
from rarefy.report.bench import bench_page

CPU = torch.device("cpu")
PATTERN = Pattern.from_units(torch.tensor([0, 3, 4, 5]), (32, 48), 16)

interpreted = pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter")


def run(lap: Lap) -> Any:
    return lap()


def close(found: torch.Tensor, exact: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found.float(), exact, rtol=rtol, atol=atol)


def batch(tokens: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 48, generator=generator), torch.randn(tokens, 32, generator=generator)


@interpreted
def test_a_bench_of_layers_and_gpts_has_its_rows(monkeypatch):
    monkeypatch.setattr(timing, "GPU_SIDE", 16)
    wanted = Settings(
        shapes=((32, 48),), gpt=((32, 1),), densities=(0.5,), blocks=((16, 16),), dtypes=("bf16",), tokens=(32,),
        context=16, step_tokens=16, seconds=0.1, rounds=3, isa="triton",
    )  # fmt: skip
    told: list[str] = []
    results = timing._run_on_gpu(wanted, told.append)
    layers = [(row.contender, row.dtype, row.kernels) for row in results.rows if row.kind == "layer"]
    dense = [("dense", dtype, "torch") for dtype in ("fp32", "bf16", "fp8")]
    assert layers == [*dense, ("rarefy", "bf16", "triton"), ("rarefy", "fp8", "triton")]
    gpts = [(row.contender, row.dtype, row.kernels) for row in results.rows if row.kind == "gpt"]
    assert gpts[0] == ("dense", "fp32", "torch") and gpts[-1] == ("rarefy", "bf16", "triton")
    ours = results.rows[3]
    assert ours.growth_ms is not None and ours.speedup is not None and ours.ceiling_gflops is None
    assert told == ["32x48, 32 tokens", "GPT 32x1"] and timing.ON_GPU in results.notes
    json.dumps(results.to_json(), allow_nan=False)


@interpreted
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_laps_compute_what_they_are_named_after(dtype):
    x, dy = batch()
    layer = SparseLinear.from_pattern(PATTERN, generator=torch.Generator().manual_seed(0))
    tolerance = {"rtol": 0.03, "atol": 0.1} if dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    with using("triton"):
        assert kernels_on_gpu((16, 16), CPU) == "triton"
        ours = sparse_on_gpu(layer, x, dy, dtype, with_growth=True)
        weight, bias = layer.dense_weight(), layer.bias
        assert bias is not None
        exact = dy.T @ x
        units = exact.view(2, 16, 3, 16).transpose(1, 2).reshape(6, 16, 16)
        close(run(ours.laps["forward"]), x @ weight.T + bias, **tolerance)
        dx, dvalues, dbias = run(ours.laps["backward"])
        close(dx, dy @ weight, **tolerance)
        close(dvalues, units[[0, 3, 4, 5]], rtol=0.05, atol=0.3)
        close(dbias, dy.sum(0), rtol=0.03, atol=0.1)
        close(run(ours.laps["dx"]), dy @ weight, **tolerance)
        grown, _ = run(ours.laps["growth"])
        assert set(grown.tolist()) <= {1, 2}
    dense = dense_on_gpu((32, 48), x, dy, dtype)
    close(run(dense.laps["dw"]), exact, rtol=0.05, atol=0.3)
    assert run(dense.laps["forward"]).dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert dense.flops == 6 * 32 * 48 * 32 and ours.flops == 6 * 4 * 256 * 32


@interpreted
def test_laps_in_fp8_compute_the_same_but_for_eight_bits():
    x, dy = batch()
    layer = SparseLinear.from_pattern(PATTERN, generator=torch.Generator().manual_seed(0))
    with using("triton"):
        for half, eight in (
            (sparse_on_gpu(layer, x, dy, "bf16", with_growth=False), sparse_in_fp8(layer, x, dy)),
            (dense_on_gpu((32, 48), x, dy, "bf16"), dense_in_fp8((32, 48), x, dy)),
        ):
            assert eight.dtype == "fp8" and eight.laps.keys() == half.laps.keys()
            for name in ("forward", "dx"):
                exact, found = run(half.laps[name]), run(eight.laps[name])
                assert 0 < (found - exact).norm() < 0.1 * exact.norm()
            assert torch.equal(run(eight.laps["dw"]), run(half.laps["dw"]))


def test_blocks_without_a_kernel_are_named_tiled_and_timed(monkeypatch):
    monkeypatch.setattr("rarefy.ops.backend._told", set())
    with pytest.warns(UserWarning, match="plain torch"):
        assert kernels_on_gpu((2, 3), CPU) == "tiled"


# -- other libraries -------------------------------------------------------------------------------------


class Stk:
    """As stk's products are documented: a matrix of blocks, dense times sparse, and dense times dense at the blocks."""

    class Matrix:
        def __init__(self, shape, data, rows, cols, offsets, turned=False) -> None:
            assert rows.dtype == cols.dtype == torch.int16 and offsets.dtype == torch.int32
            self.given, self.turned = (shape, data, rows, cols, offsets), turned

        def t(self) -> Stk.Matrix:
            return Stk.Matrix(*self.given, turned=not self.turned)

        def dense(self) -> torch.Tensor:
            shape, data, _, cols, offsets = self.given
            found = scatter(data, Pattern(offsets, cols.int(), shape, data.shape[1]))
            return found.T if self.turned else found

    ops = types.SimpleNamespace(
        dds=lambda a, matrix: a @ matrix.dense(),
        sdd=lambda a, b, topology: (a @ b, topology),
    )


def test_stk_is_given_our_pattern_and_its_three_products_are_asked_for():
    x, dy = batch()
    laps = peers.stk(Stk, PATTERN, x, dy)
    weight = scatter(peers._values(PATTERN, x), PATTERN)
    close(run(laps["forward"]), x @ weight.T)
    dx, (dw, topology) = run(laps["backward"])
    close(dx, dy @ weight)
    close(dw, dy.T @ x)
    assert not topology.turned


class Blksprs:
    """As blksprs' matmul is documented, but that it keeps dense what it should compress."""

    def __init__(self) -> None:
        self.ops = types.SimpleNamespace(to_sparse=self.to_sparse, matmul=self.matmul)

    @staticmethod
    def to_sparse(dense, layout, side):
        assert dense.dim() == layout.dim() == 3 and layout.dtype == torch.bool and layout.is_contiguous()
        return dense * layout.repeat_interleave(side, 1).repeat_interleave(side, 2)

    @staticmethod
    def matmul(a, layout_a, b, layout_b, layout_out, side, *, layout_cache):
        assert layout_a.shape[2] == layout_b.shape[1] and layout_out.shape[1:] == (layout_a.shape[1], layout_b.shape[2])
        assert layout_a.all() and layout_out.all()
        return a @ b


def test_blksprs_is_given_our_pattern_and_gives_both_gradients():
    x, dy = batch()
    laps = peers.blksprs(Blksprs(), PATTERN, x, dy)
    run(laps["forward"])
    da, dw = run(laps["backward"])
    weight = torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(0))[0] * PATTERN.to_mask().T
    close(da[0], dy @ weight.T)
    close(dw[0], x.T @ dy)


def test_torchs_layout_is_right():
    x, dy = batch()
    weight = scatter(peers._values(PATTERN, x), PATTERN)
    close(run(peers.torch_bsr(PATTERN, x, dy)["forward"]), x @ weight.T)


def test_a_peer_that_fails_is_noted_and_one_that_does_not_fit_is_not_asked():
    def fails(pattern, x, dy):
        raise RuntimeError("no kernel image\nis available")

    notes: list[str] = []
    asked = [
        GpuPeer("broken 1.0", "broken", torch.float16, fails),
        GpuPeer("large 2.0", "large", torch.float16, fails, (128,)),
        GpuPeer("torch BSR", "torch", torch.float32, peers.torch_bsr),
    ]
    found = peers_on_gpu(asked, PATTERN, *batch(), notes)
    assert [contender.name for contender in found] == ["torch BSR"]
    assert notes == ["broken 1.0 cannot run 32x48: no kernel image"]
    assert found[0].flops == 2 * PATTERN.nnz * 32


def test_without_others_only_torch_is_beside_us(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert [peer.name for peer in installed_for_gpu([])] == ["torch BSR"]


# -- the command -----------------------------------------------------------------------------------------


def test_the_command_passes_the_device_on_and_a_machine_without_one_says_so():
    settings = wish(Bench(shapes=("64x64",), blocks=(16,), device="cuda"))
    assert settings.device == "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda cannot be used here"):
            timing.run(settings)


@interpreted
def test_a_table_and_a_file_name_say_which_gpu(monkeypatch, capsys):
    monkeypatch.setattr(timing, "GPU_SIDE", 16)
    shape: dict[str, Any] = {"shapes": ((32, 48),), "blocks": ((16, 16),), "tokens": (16,), "dtypes": ("fp32", "bf16")}
    wanted = Settings(**shape, seconds=0.1, rounds=3, isa="triton")
    results = timing._run_on_gpu(wanted, lambda text: None)
    results.machine["gpu"] = "NVIDIA H200"
    results.settings["device"] = "cuda"
    show(results, Console(width=120))
    said = capsys.readouterr().out
    assert said.startswith("NVIDIA H200, torch ") and "rarefy 16x16 fp32" in said and "CUDA graphs" in said
    assert "dense fp8" in said and "rarefy 16x16 fp8" in said
    page = bench_page(results.to_json())
    assert "NVIDIA H200 · " in page and "fp8" in page
    assert name_of(results) == f"{results.machine['date'][:10]}-nvidia-h200.json"
