"""Two gloo ranks on this machine against one: the same patterns, one choice for all, and a clear end where they differ.

Run as a script this file is one of the ranks.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rarefy
from rarefy import (
    SET,
    CHTs,
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
    SRigL,
    sparsify,
)

RANKS = 2
STEPS = 12


def build(method: rarefy.Method, width: int = 24) -> tuple[nn.Module, Rewirer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    return model, sparsify(model, Plan(density=0.3, method=method, seed=2))


def batch(step: int) -> Tensor:
    return torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def methods() -> dict[str, rarefy.Method]:
    common = {"interval": 3, "end": 50, "fraction": Constant(0.3)}
    return {
        "RigL": RigL(**common, signal=Exact()),
        "RigL all at once": RigL(**common, signal=Exact(), stagger=False, may_return=True),
        "RigL of tokens": RigL(**common, signal=SampledTokens(tokens=32)),
        "RigL of norms": RigL(**common, signal=NormProduct(), may_return=True),
        "RigL of momentum": RigL(**common, signal=Momentum(steps=3), may_return=True),
        "RigL of two steps": RigL(**common, signal=Momentum(steps=2, pool=3, source=NormProduct())),
        "SET": SET(**common),
        "SRigL": SRigL(**common, ablate=False),  # DDP's buckets are of the sizes that parameters had at first
        "CHTs": CHTs(**common),
    }


def train(model: nn.Module, rewirer: Rewirer, rank: int, ranks: int, micro_batches: int = 1) -> list[dict[str, str]]:
    """The patterns after every step, of a run whose batches are split over ranks and micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rewirer.attach(optimizer)
    patterns = []
    for at in range(STEPS):
        mine = batch(at).chunk(ranks)[rank]
        for part in mine.chunk(micro_batches):
            (model(part).pow(2).mean() / micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        patterns.append({name: layer.pattern.digest() for name, layer in rewirer.layers.items()})
    return patterns


def no_sync_train(model: DistributedDataParallel, rewirer: Rewirer, rank: int) -> list[dict[str, str]]:
    """As `train` with two micro-batches, the first without DDP's all-reduce, as one does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rewirer.attach(optimizer)
    patterns = []
    for at in range(STEPS):
        first, second = batch(at).chunk(RANKS)[rank].chunk(2)
        with model.no_sync():
            (model(first).pow(2).mean() / 2).backward()
        (model(second).pow(2).mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        patterns.append({name: layer.pattern.digest() for name, layer in rewirer.layers.items()})
    return patterns


# -- what a rank does --


def same_as_one_rank(rank: int, name: str, micro_batches: int) -> dict[str, Any]:
    model, rewirer = build(methods()[name])
    parallel = DistributedDataParallel(model)
    patterns = train(parallel, rewirer, rank, RANKS, micro_batches)
    return {
        "patterns": patterns,
        "values": sum(float(layer.values.detach().sum()) for layer in rewirer.layers.values()),
    }


def sampled(rank: int) -> dict[str, Any]:
    """Each rank draws rows of its own, and of another number; both choose by all of them."""
    method = RigL(interval=3, end=50, fraction=Constant(0.3), signal=SampledTokens(tokens=6, by="norm"))
    model, rewirer = build(method)
    return {"patterns": train(DistributedDataParallel(model), rewirer, rank, RANKS), "skipped": rewirer.skipped}


def with_no_sync(rank: int) -> dict[str, Any]:
    model, rewirer = build(methods()["RigL"])
    return {"patterns": no_sync_train(DistributedDataParallel(model), rewirer, rank)}


def buffers_stay(rank: int, compiles: bool) -> dict[str, Any]:
    """DDP's start and its forward would both send rank 0's buffers; patterns of uint16 and of int32 are left alone."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(70_000, 4), nn.Linear(4, 6), nn.BatchNorm1d(6))
    rewirer = sparsify(model, Plan(density=0.1, seed=rank))
    before = {name: layer.pattern.digest() for name, layer in rewirer.layers.items()}
    kinds = [str(layer.col_indices.dtype) for layer in rewirer.layers.values()]
    inner = torch.compile(model, backend="eager") if compiles else model
    parallel = DistributedDataParallel(inner, broadcast_buffers=True)  # type: ignore[arg-type]
    parallel(torch.randn(3, 70_000)).sum().backward()
    after = {name: layer.pattern.digest() for name, layer in rewirer.layers.items()}
    ignored = sorted(name.rpartition(".")[2] for name in parallel.parameters_to_ignore)
    return {"kept": before == after, "kinds": kinds, "ignored": ignored, "patterns": before}


def mismatch(rank: int, what: str) -> dict[str, Any]:
    """Ranks that differ in pattern or values, or whose engines were seeded apart, find out at the first rewire."""
    model, rewirer = build(SET(interval=1, end=9, fraction=Constant(0.3)))
    if what == "seed":
        rewirer.seed = rank
    if what == "values":
        with torch.no_grad():
            rewirer.layers["0"].values.add_(rank * 1e-12)  # less than fp32 can tell
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rewirer.attach(optimizer)
    try:
        optimizer.step()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def nonfinite(rank: int, where: str) -> dict[str, Any]:
    """Rank 1 alone sees a NaN: neither rewires."""
    method = RigL(interval=1, end=9, fraction=Constant(0.3)) if where == "gradient" else methods()["SET"]
    layer = SparseLinear(12, 8, density=0.3, generator=torch.Generator().manual_seed(0))
    rewirer = Rewirer({"layer": layer}, method)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rewirer.attach(optimizer)
    before, told = layer.pattern, []
    for _ in range(3):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
        if rank == 1 and where == "gradient":
            x[0, 0] = math.nan
        if rank == 1 and where == "values":
            with torch.no_grad():
                layer.values[2] = math.nan
        layer(x).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told.append(len(caught))
        optimizer.zero_grad()
    return {"same": layer.pattern == before, "skipped": rewirer.skipped, "told": told, "history": len(rewirer.history)}


def left_out_on_one(rank: int) -> dict[str, Any]:
    """A layer that one rank did not use has no mean gradient: it stays on both."""
    layer = SparseLinear(12, 8, density=0.3, generator=torch.Generator().manual_seed(0))
    rewirer = Rewirer({"layer": layer}, RigL(interval=1, end=9, fraction=Constant(0.3)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    rewirer.attach(optimizer)
    patterns = []
    for at in range(3):
        if rank == 0 or at != 1:
            layer(torch.randn(4, 12, generator=torch.Generator().manual_seed(at))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        patterns.append(layer.pattern.digest())
    return {"patterns": patterns, "history": [record["step"] for record in rewirer.history]}


def falls(rank: int, ranks: int = RANKS) -> dict[str, Any]:
    """A density that falls, gradients averaged by hand; and DDP, which cannot have it."""
    model, rewirer = build(GraNet(interval=3, end=10))
    refused = ""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if ranks > 1:
        parallel = DistributedDataParallel(model)
        try:
            rewirer.attach(optimizer)
        except ValueError as error:
            refused = str(error)
        model = parallel.module
        del parallel
        gc.collect()
    rewirer.attach(optimizer)
    patterns = []
    for at in range(STEPS):
        model(batch(at).chunk(ranks)[rank]).pow(2).mean().backward()
        for p in model.parameters():
            if ranks > 1 and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= ranks
        optimizer.step()
        optimizer.zero_grad()
        patterns.append({name: layer.pattern.digest() for name, layer in rewirer.layers.items()})
    sizes = [layer.num_units for layer in rewirer.layers.values()]
    return {"patterns": patterns, "sizes": sizes, "refused": refused}


SCENES = {
    "falls": falls,
    **{
        f"{name} x{parts}": lambda rank, n=name, p=parts: same_as_one_rank(rank, n, p)
        for name in methods()
        for parts in (1, 2)
    },
    "sampled": sampled,
    "no_sync": with_no_sync,
    "buffers": lambda rank: buffers_stay(rank, False),
    "buffers, compiled": lambda rank: buffers_stay(rank, True),
    **{f"mismatch {what}": lambda rank, w=what: mismatch(rank, w) for what in ("seed", "values", "nothing")},
    **{f"nonfinite {where}": lambda rank, w=where: nonfinite(rank, w) for where in ("gradient", "values")},
    "left out": left_out_on_one,
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = {}
    for name, scene in SCENES.items():
        found[name] = scene(rank)
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# -- the tests --


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank saw in every scene."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(RANKS)]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_rule_2_7_two_ranks_change_density_as_one_and_ddp_is_refused(found):
    alone = falls(0, 1)
    assert sum(alone["sizes"]) == round(0.3 * (12 * 24 + 24 * 16 + 16 * 4))
    for rank in found:
        assert rank["falls"]["patterns"] == alone["patterns"] and rank["falls"]["sizes"] == alone["sizes"]
        assert "DistributedDataParallel holds the values of 0" in rank["falls"]["refused"]
        assert "average its gradients" in rank["falls"]["refused"]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", methods())
def test_rule_8_2_two_ranks_rewire_as_one_with_the_whole_batch(found, name, micro_batches):
    """At every step; for RigL because the gradient is averaged over ranks and micro-batches before it is scored."""
    model, rewirer = build(methods()[name])
    alone = train(model, rewirer, 0, 1)
    assert len({json.dumps(patterns) for patterns in alone}) >= STEPS // 3
    for rank in found:
        assert rank[f"{name} x{micro_batches}"]["patterns"] == alone
        values = sum(float(layer.values.detach().sum()) for layer in rewirer.layers.values())
        assert rank[f"{name} x{micro_batches}"]["values"] == pytest.approx(values, rel=1e-9)


def test_rule_8_2_ranks_that_sample_rows_agree(found):
    first, second = (rank["sampled"] for rank in found)
    assert first == second and first["skipped"] == 0
    assert len({json.dumps(patterns) for patterns in first["patterns"]}) >= STEPS // 3


def test_rule_6_4_accumulation_under_no_sync(found):
    model, rewirer = build(methods()["RigL"])
    alone = train(model, rewirer, 0, 1)
    assert found[0]["no_sync"]["patterns"] == found[1]["no_sync"]["patterns"] == alone


@pytest.mark.parametrize("scene", ["buffers", "buffers, compiled"])
def test_rule_8_2_ddp_does_not_broadcast_indices(found, scene):
    for rank in found:
        assert rank[scene]["kept"]
        assert rank[scene]["kinds"] == ["torch.int32", "torch.uint16"]
        assert {"crow_indices", "col_indices", "t_crow", "t_rows", "t_perm", "sink"} == set(rank[scene]["ignored"])
    assert found[0][scene]["patterns"] != found[1][scene]["patterns"]


@pytest.mark.parametrize("what", ["seed", "values"])
def test_rule_8_2_a_mismatch_raises_on_every_rank(found, what):
    for rank in found:
        assert "ranks disagree on the pattern or values of 0 after a rewire" in rank[f"mismatch {what}"]["error"]
        assert rank["mismatch nothing"]["error"] == ""


@pytest.mark.parametrize("where", ["gradient", "values"])
def test_rule_8_3_not_finite_on_one_rank_skips_on_all(found, where):
    steps = 3 if where == "gradient" else 1
    for rank in found:
        told = [1, 0, 0] if where == "gradient" else [0, 0, 1]
        wanted = {"same": True, "skipped": steps, "told": told, "history": 0}
        assert rank[f"nonfinite {where}"] == wanted


def test_rule_6_4_a_layer_that_one_rank_did_not_use_stays(found):
    for rank in found:
        patterns = rank["left out"]["patterns"]
        assert rank["left out"]["history"] == [1, 3]
        assert patterns[0] == patterns[1] != patterns[2]
    assert found[0]["left out"] == found[1]["left out"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
