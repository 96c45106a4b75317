"""Saving and loading: exact, deterministic, small, whole or not at all; every bad file refused by name."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rarefy
from rarefy.files import Checkpoint, DiskFull, atomic_write, container, read, tree

PLAN = rarefy.Plan(density=0.2, method=rarefy.RigL(interval=3), keep_dense=("head",))


class Net(nn.Module):
    """Unstructured and dense layers, a norm, a tied tensor, buffers of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 24)
        self.tied = nn.Linear(24, 24)
        self.tied.weight = self.head.weight
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("crossed", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("narrow", torch.linspace(0, 1, 5).bfloat16())
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(x + self.down(torch.relu(self.norm(self.up(x))))))


class Lazy(torch.optim.Optimizer):
    """An optimizer nobody has seen: nested state, an integer tensor, a tuple, strings."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "tag": "odd", "pair": (1, 2.5)})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(seen=torch.zeros(p.shape[:1], dtype=torch.int16), nested={"mean": torch.zeros_like(p)})
                state["seen"] += 1
                state["nested"]["mean"].lerp_(p.grad, 0.5)
                p.data -= group["lr"] * state["nested"]["mean"]


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
        "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
        "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
        "rarefy": lambda params: rarefy.AdamW(params, lr=0.01, ramp=4),
        "lazy": Lazy,
    }


def build(seed: int = 0, optimizer: str = "rarefy", plan: rarefy.Plan = PLAN) -> tuple[Any, Any, Any]:
    """Model, rewirer and attached optimizer."""
    torch.manual_seed(seed)
    model = Net()
    rewirer = rarefy.sparsify(model, plan)
    chosen = optimizers()[optimizer](model.parameters())
    rewirer.attach(chosen, total_steps=60)
    return model, rewirer, chosen


def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for t in range(begin, end):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()


def state_of(model: nn.Module, rewirer: Any = None, optimizer: Any = None) -> Any:
    """All state, for comparison."""
    parts = [model.state_dict(), rewirer and rewirer.state_dict(), optimizer and optimizer.state_dict()]
    return copy.deepcopy(parts)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, with types."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with everything in it, of a network that has rewired."""
    model, rewirer, optimizer = build()
    train(model, optimizer, 0, 10)
    assert rewirer.history
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    rarefy.save(model, path, rewirer=rewirer, optimizer=optimizer, extra={"position": 10})
    return path


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """The file with something changed and all digests right again, as someone who knows the format could write it."""
    found = container.read(source)
    metadata = {
        name: text for name, text in found.metadata.items() if name not in (container.DIGEST, container.TENSORS)
    }
    tensors = dict(found.tensors)
    change(tensors, metadata)
    container.write(target, tensors, metadata)
    return target


# -- round trips ------------------------------------------------------------------------------------------------------


def test_load_gives_tensors_and_patterns(trained: Path) -> None:
    found = rarefy.load(trained)

    assert set(found) == {
        *("up.values", "up.pattern", "up.bias", "down.values", "down.pattern", "norm.weight", "norm.bias"),
        *("head.weight", "head.bias", "tied.weight", "tied.bias", "count", "nothing", "crossed", "narrow", "flags"),
    }
    assert isinstance(found["up.pattern"], rarefy.Pattern) and found["up.pattern"].shape == (40, 24)
    assert found["tied.weight"] is found["head.weight"]


def test_every_tensor_survives_bitwise(tmp_path: Path) -> None:
    model, *_ = build()
    rarefy.save(model, tmp_path / "a.safetensors")
    other, *_ = build(seed=1)
    other.narrow += 1

    rarefy.load_into(tmp_path / "a.safetensors", other)

    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.tied.weight is other.head.weight
    x = torch.randn(3, 24)
    assert torch.equal(model(x), other(x))  # what follows from the pattern was rebuilt


@pytest.mark.parametrize("dtype", container.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (4, 3)], ids=str)
def test_container_keeps_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    raw = torch.arange(1, 1 + int(np.prod(shape)) * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = raw.view(torch.bool if dtype is torch.bool else dtype).view(shape)
    container.write(tmp_path / "t.safetensors", {"t": tensor, "z": torch.ones(1, dtype=torch.float64)}, {})

    found = container.read(tmp_path / "t.safetensors")

    read_back, read_by_others = found.tensors["t"], load_file(tmp_path / "t.safetensors")["t"]
    for result in (read_back, read_by_others):
        assert (result.dtype, result.shape) == (dtype, tensor.shape)
        assert result.reshape(-1).view(torch.uint8).tolist() == raw.tolist()
    assert not found.damaged


@pytest.mark.parametrize("block", [1, 4, (2, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_blocks_and_dtypes(block: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    layer, other = (rarefy.SparseLinear(64, 32, density=0.25, block=block, dtype=dtype) for _ in range(2))
    assert other.pattern != layer.pattern
    rarefy.save(nn.Sequential(layer), tmp_path / "a.safetensors")

    rarefy.load_into(tmp_path / "a.safetensors", nn.Sequential(other))

    assert other.pattern == layer.pattern
    assert torch.equal(other.dense_weight(), layer.dense_weight())


def test_a_model_that_is_a_sparse_layer(tmp_path: Path) -> None:
    model = rarefy.SparseLinear(8, 8, density=0.5)
    rarefy.save(model, tmp_path / "a.safetensors")

    assert set(rarefy.load(tmp_path / "a.safetensors")) == {"values", "pattern", "bias"}
    other = rarefy.SparseLinear(8, 8, density=0.5)
    rarefy.load_into(tmp_path / "a.safetensors", other)
    assert torch.equal(other.dense_weight(), model.dense_weight())


def test_wide_columns_are_int32_and_narrow_ones_uint16(tmp_path: Path) -> None:
    wide = rarefy.SparseLinear.from_pattern(rarefy.Pattern(torch.tensor([0, 2]), torch.tensor([3, 65536]), (1, 65537)))
    tall = rarefy.SparseLinear.from_pattern(
        rarefy.Pattern(torch.arange(65538).clamp(max=2), torch.tensor([0, 1]), (65537, 2))
    )
    rarefy.save(nn.ModuleDict({"wide": wide, "tall": tall}), tmp_path / "a.safetensors")

    found = load_file(tmp_path / "a.safetensors")

    assert found["wide.col_indices"].dtype == torch.int32 and found["tall.col_indices"].dtype == torch.uint16
    assert rarefy.load(tmp_path / "a.safetensors")["wide.pattern"] == wide.pattern
    other = copy.deepcopy(nn.ModuleDict({"wide": wide, "tall": tall}))
    rarefy.load_into(tmp_path / "a.safetensors", other)  # the layer holds int32, as its rows need it
    assert other["tall"].pattern == tall.pattern


def test_shared_modules_are_stored_once(tmp_path: Path) -> None:
    layer = rarefy.SparseLinear(16, 16, density=0.5)
    rarefy.save(nn.ModuleDict({"a": layer, "b": layer}), tmp_path / "a.safetensors")

    assert set(load_file(tmp_path / "a.safetensors")) == {"a.values", "a.crow_indices", "a.col_indices", "a.bias"}
    found = rarefy.load(tmp_path / "a.safetensors")
    assert found["b.values"] is found["a.values"] and found["b.pattern"] == layer.pattern
    other = rarefy.SparseLinear(16, 16, density=0.5)
    rarefy.load_into(tmp_path / "a.safetensors", nn.ModuleDict({"a": other, "b": other}))
    assert torch.equal(other.dense_weight(), layer.dense_weight())


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    model, *_ = build()
    rarefy.save(model, tmp_path / "a.safetensors")
    compiled: Any = torch.compile(model)
    rarefy.save(compiled, tmp_path / "b.safetensors")

    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other, *_ = build(seed=1)
    compiled = torch.compile(other)
    rarefy.load_into(tmp_path / "a.safetensors", compiled)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("kind", optimizers())
def test_resume_is_bitwise_9_1(kind: str, tmp_path: Path) -> None:
    model, rewirer, optimizer = build(optimizer=kind)
    train(model, optimizer, 0, 20)
    rarefy.save(model, tmp_path / "half.safetensors", rewirer=rewirer, optimizer=optimizer)
    train(model, optimizer, 20, 40)
    rarefy.save(model, tmp_path / "straight.safetensors", rewirer=rewirer, optimizer=optimizer)

    model, rewirer, optimizer = build(seed=5, optimizer=kind)
    train(model, optimizer, 100, 107)
    rarefy.load_into(tmp_path / "half.safetensors", model, rewirer=rewirer, optimizer=optimizer)
    rarefy.save(model, tmp_path / "again.safetensors", rewirer=rewirer, optimizer=optimizer)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "half.safetensors").read_bytes()

    train(model, optimizer, 20, 40)
    rarefy.save(model, tmp_path / "resumed.safetensors", rewirer=rewirer, optimizer=optimizer)
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    extra = {
        "rng": torch.get_rng_state(),
        "position": [3, (4, None, True)],
        "rates": {0: 0.1, 1: float("nan"), (2, "b"): -float("inf")},
        "$odd": 'text with " and ü',
        "long": 2**70,
        "a.b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2.0)},
        "tiny": 5e-324,
        "third": 1 / 3,
    }
    rarefy.save(nn.Linear(2, 2), tmp_path / "a.safetensors", extra=extra)

    assert same(read(tmp_path / "a.safetensors").extra, extra)
    assert set(rarefy.load(tmp_path / "a.safetensors")) == {"weight", "bias"}


def test_a_submodule_named_optimizer_is_the_models(tmp_path: Path) -> None:
    model = nn.ModuleDict({"optimizer": nn.ModuleDict({"state": nn.Linear(2, 2)})})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarefy.save(model, tmp_path / "a.safetensors", optimizer=optimizer, extra={"weight": torch.ones(2)})
    assert set(rarefy.load(tmp_path / "a.safetensors")) == {"optimizer.state.weight", "optimizer.state.bias"}


class Custom:
    pass


@pytest.mark.parametrize(
    "extra",
    [{"loop": {"when": Custom()}}, {"loop": {"when": {1, 2}}}, {"loop": {"when": np.ones(2)}}],
    ids=["object", "set", "array"],
)
def test_what_cannot_be_saved_is_named(extra: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors.*extra\.loop\.when is a "):
        rarefy.save(nn.Linear(2, 2), tmp_path / "a.safetensors", extra=extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor, reason",
    [
        (torch.eye(3).to_sparse(), "layout"),
        (torch.empty(2, device="meta"), "meta device"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
    ids=["sparse", "meta", "complex128"],
)
def test_tensors_without_plain_bytes_are_refused(tensor: Tensor, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a\.safetensors.*extra\.t .*{reason}"):
        rarefy.save(nn.Linear(2, 2), tmp_path / "a.safetensors", extra={"t": tensor})


# -- deterministic, small, not densified ------------------------------------------------------------------------------


SCRIPT = """
import sys, torch, rarefy
from torch import nn

torch.manual_seed(3)
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.2))
optimizer = rarefy.AdamW(model.parameters())
rewirer.attach(optimizer, total_steps=9)
model(torch.ones(2, 32)).sum().backward()
optimizer.step()
rarefy.save(model, sys.argv[1], rewirer=rewirer, optimizer=optimizer, extra={"b": 1, "a": {"y": 2, "x": torch.ones(2)}})
"""


def test_equal_states_give_equal_bytes_in_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    monkeypatch.setattr(sys, "argv", ["script", str(here)])
    exec(SCRIPT, {})
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(there)], check=True, env=environment)
    assert here.read_bytes() == there.read_bytes()


def test_order_of_dicts_does_not_matter(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    rarefy.save(model, tmp_path / "a.safetensors", extra={"a": 1, "b": {2: torch.ones(1), 1: torch.zeros(1)}})
    rarefy.save(model, tmp_path / "b.safetensors", extra={"b": {1: torch.zeros(1), 2: torch.ones(1)}, "a": 1})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("rows, cols", [(1024, 1024), (4096, 1024), (1024, 4096)])
@pytest.mark.parametrize("block", [1, 4], ids=["unstructured", "4x4"])
def test_at_most_016_of_dense(rows: int, cols: int, block: int, tmp_path: Path) -> None:
    model = nn.Sequential(rarefy.SparseLinear(cols, rows, bias=False, density=0.1, block=block))
    rarefy.save(model, tmp_path / "a.safetensors")
    save_file({"weight": torch.zeros(rows, cols)}, tmp_path / "dense.safetensors")
    small, dense = ((tmp_path / name).stat().st_size for name in ("a.safetensors", "dense.safetensors"))
    assert small <= 0.16 * dense


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know the memory in use")
def test_saving_and_loading_densify_nothing(tmp_path: Path) -> None:
    size = 2**16  # dense: 16 GiB, more than this process may take
    units = torch.arange(0, size * size, size * size // 4096)
    layer = rarefy.SparseLinear.from_pattern(rarefy.Pattern.from_units(units, (size, size)), bias=False)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        rarefy.save(nn.Sequential(layer), tmp_path / "a.safetensors")
        rarefy.load_into(tmp_path / "a.safetensors", nn.Sequential(layer))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (tmp_path / "a.safetensors").stat().st_size < 2**20


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    atomic_write(path, lambda file: file.write(b"newer"))
    assert path.read_bytes() == b"newer" and [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_atomic_write_follows_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    atomic_write(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "real").read_bytes() == b"x"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_writer_changes_nothing(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")

    def write(file: Any) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(tmp_path / "a.bin", write)
    assert (tmp_path / "a.bin").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_last_moment(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskFull, match=r"a\.bin cannot be written: 3 bytes are needed and [\d,]+ are free") as caught:
        atomic_write(tmp_path / "a.bin", b"new")
    assert caught.value.errno == code and "\n" not in str(caught.value)
    assert (tmp_path / "a.bin").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """The kernel refuses to let any file of this process grow past 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield 2**16
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_may_not_grow(tmp_path: Path, file_size_limit: int) -> None:
    path = tmp_path / "a.safetensors"
    rarefy.save(nn.Linear(4, 4), path)
    before = path.read_bytes()
    model = rarefy.SparseLinear(1024, 1024, density=0.1)

    with pytest.raises(DiskFull, match=r"a\.safetensors cannot be written: 6\d\d,\d\d\d bytes are needed"):
        rarefy.save(model, path)

    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(tiny_disk: Path) -> None:
    path = tiny_disk / "a.safetensors"
    rarefy.save(nn.Linear(4, 4), path)
    before = path.read_bytes()

    with pytest.raises(DiskFull, match=r"a\.safetensors cannot be written: 6\d\d,\d\d\d bytes are needed and"):
        rarefy.save(rarefy.SparseLinear(1024, 1024, density=0.1), path)

    assert path.read_bytes() == before and len(list(tiny_disk.iterdir())) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rarefy.save(nn.Linear(2, 2), tmp_path / "nowhere" / "a.safetensors")


# -- bad files --------------------------------------------------------------------------------------------------------


def refused(path: Path, *words: str) -> None:
    """`load` and `load_into` refuse the file with one line that has these words, and the model stays as it was."""
    model, rewirer, optimizer = build(seed=2)
    train(model, optimizer, 0, 4)
    before = state_of(model, rewirer, optimizer)
    for attempt in (
        lambda: rarefy.load(path),
        lambda: rarefy.load_into(path, model, rewirer=rewirer, optimizer=optimizer),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        assert all(word in message for word in words), message
    assert same(state_of(model, rewirer, optimizer), before)


def test_truncated_anywhere(trained: Path, tmp_path: Path) -> None:
    raw = trained.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    path = tmp_path / "a.safetensors"
    for length in (0, 5, 8, 100, header - 1, header, header + 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"truncated|empty|shorter than 8"):
            rarefy.load(path)
    refused(path, "truncated", f"{len(raw):,}")


def test_bytes_too_many(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(trained.read_bytes() + b"\0")
    refused(tmp_path / "a.safetensors", "1 bytes follow")


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rarefy.save(rarefy.SparseLinear(4, 4, density=0.5), path)
    raw = bytearray(path.read_bytes())
    for at in range(len(raw)):
        for flip in (1, 0x20, 0x80):
            raw[at] ^= flip
            path.write_bytes(raw)
            with pytest.raises(ValueError, match=r"a\.safetensors"):
                rarefy.load(path)
            raw[at] ^= flip
    path.write_bytes(raw)
    assert set(rarefy.load(path)) == {"values", "pattern", "bias"}


@pytest.mark.parametrize("name", ["up.values", "up.bias", "head.weight", "optimizer.state.0.exp_avg"])
def test_a_changed_tensor_is_named(name: str, trained: Path, tmp_path: Path) -> None:
    raw = bytearray(trained.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    raw[start + entry["data_offsets"][0] + 2] ^= 4
    (tmp_path / "a.safetensors").write_bytes(raw)
    refused(tmp_path / "a.safetensors", name, "tampered")


def test_changed_indices_are_named(trained: Path, tmp_path: Path) -> None:
    raw = bytearray(trained.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8:start])["up.col_indices"]["data_offsets"]
    raw[start + begin : start + begin + 2] = b"\xff\xff"
    (tmp_path / "a.safetensors").write_bytes(raw)
    refused(tmp_path / "a.safetensors", "up: col_indices must lie in", "col_indices changed after")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    for legacy, name in ((False, "zip.pt"), (True, "bare.pt")):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / name, "never loads pickles", "weights_only=True")


@pytest.mark.parametrize("raw", [b"hello world, this is no tensor", b"\0" * 64, b"\x02" + b"\0" * 7 + b"[]", b"{}" * 9])
def test_other_files_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    refused(tmp_path / "a.txt", "not a safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 4 * 10**24]},
        {"shape": [1]},
        {},
    ],
    ids=str,
)
def test_headers_that_make_no_sense(entry: Any, tmp_path: Path) -> None:
    text = json.dumps({"fc.weight": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    refused(tmp_path / "a.safetensors", "truncated" if 10**12 in entry.get("shape", []) else "fc.weight")


def _set(name: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: tensors.update({name: tensor(tensors[name])})


def _swap_first(cols: Tensor) -> Tensor:
    return torch.cat([cols.int()[:2].flip(0), cols.int()[2:]])


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "crow missing": (lambda tensors, _: tensors.pop("up.crow_indices"), "up: its pattern is missing (crow_indices)"),
    "cols missing": (lambda tensors, _: tensors.pop("down.col_indices"), "down: its pattern is missing (col_indices)"),
    "values missing": (lambda tensors, _: tensors.pop("up.values"), "up: its values are missing"),
    "out of range": (_set("up.col_indices", lambda cols: cols.int() + 24), "up: col_indices must lie in [0, 24)"),
    "unsorted": (_set("up.col_indices", _swap_first), "up: col_indices must rise strictly"),
    "too few": (_set("up.col_indices", lambda cols: cols[:-1]), "up: crow_indices must rise from 0"),
    "falling": (
        _set("down.crow_indices", lambda crow: torch.cat([crow[:1], crow[1:-1].flip(0), crow[-1:]])),
        "down: crow",
    ),
    "too many values": (_set("up.values", lambda values: torch.cat([values, values])), "up: values of shape"),
    "floats": (_set("up.col_indices", lambda cols: cols.float()), "up: indices must be integers"),
    "another pattern": (
        _set(
            "up.col_indices", lambda cols: torch.where(torch.arange(cols.numel()) == 0, _free_first(cols), cols.int())
        ),
        "up: its pattern does not match the digest",
    ),
    "newer": (lambda _, metadata: metadata.update({"rarefy.version": "2"}), "format version 2"),
    "no version": (lambda _, metadata: metadata.pop("rarefy.version"), "no format version"),
    "no layers": (lambda _, metadata: metadata.pop("rarefy.layers"), "rarefy.layers"),
    "no JSON": (lambda _, metadata: metadata.update({"rarefy.layers": "{"}), ""),
    "odd layers": (lambda _, metadata: metadata.update({"rarefy.layers": '{"up": 3}'}), "its metadata cannot be read"),
    "odd alias": (lambda _, metadata: metadata.update({"rarefy.aliases": '{"x": "y"}'}), "x: is stored as y"),
    "odd tree": (lambda _, metadata: metadata.update({"rarefy.extra": '{"$tensor": "nowhere"}'}), "saved state"),
}


def _free_first(cols: Tensor) -> Tensor:
    """A column below or beside the first one that keeps its row sorted."""
    first = int(cols[0])
    return torch.tensor(first - 1 if first else first + 1, dtype=torch.int32)


@pytest.mark.parametrize("case", BROKEN)
def test_what_rarefy_would_not_have_written(case: str, trained: Path, tmp_path: Path) -> None:
    change, words = BROKEN[case]
    refused(rewrite(trained, tmp_path / "a.safetensors", change), words)


def test_rewrite_alone_breaks_nothing(trained: Path, tmp_path: Path) -> None:
    assert rewrite(trained, tmp_path / "a.safetensors", lambda *_: None).read_bytes() == trained.read_bytes()


# -- files of other origin --------------------------------------------------------------------------------------------


def test_plain_safetensors_are_plain_tensors(tmp_path: Path) -> None:
    dense = nn.Linear(3, 2)
    save_file(dense.state_dict(), tmp_path / "a.safetensors")
    assert same(rarefy.load(tmp_path / "a.safetensors"), dict(sorted(dense.state_dict().items())))
    other = nn.Linear(3, 2)
    rarefy.load_into(tmp_path / "a.safetensors", other)
    assert torch.equal(other.weight, dense.weight)


def test_arrays_without_our_metadata_are_refused(tmp_path: Path) -> None:
    model, *_ = build()
    save_file({name: t.clone().contiguous() for name, t in model.state_dict().items()}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "down", "without its shape and pattern digest")


def test_others_can_read_ours(trained: Path) -> None:
    with safe_open(trained, framework="np") as file:
        assert file.metadata()["rarefy.version"] == "1"
        layers = json.loads(file.metadata()["rarefy.layers"])
        assert layers["up"]["shape"] == [40, 24] and layers["up"]["units"] == file.get_tensor("up.values").shape[0]


# -- files that do not fit --------------------------------------------------------------------------------------------


def misfit(path: Path, model: nn.Module, *words: str, **training: Any) -> None:
    before = state_of(model, **training)
    with pytest.raises(ValueError) as caught:
        rarefy.load_into(path, model, **training)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message
    assert same(state_of(model, **training), before)


def test_a_dense_model_is_told_to_sparsify(trained: Path) -> None:
    misfit(trained, Net(), "down", "sparse", "rarefy.sparsify(model, plan)")


def test_a_dense_file_into_a_sparse_model(tmp_path: Path) -> None:
    rarefy.save(Net(), tmp_path / "a.safetensors")
    misfit(tmp_path / "a.safetensors", build()[0], "up", "the file dense")


def test_another_density_or_block(trained: Path) -> None:
    misfit(trained, build(plan=rarefy.Plan(density=0.3, keep_dense=("head",)))[0], "down", "units of 1x1")
    misfit(trained, build(plan=rarefy.Plan(density=0.2, block=4, keep_dense=("head",)))[0], "down", "of 4x4")


def test_another_architecture(trained: Path) -> None:
    misfit(trained, nn.Linear(3, 3), "down", "no such layer")
    wider = build()[0]
    wider.norm = nn.LayerNorm(41)
    misfit(trained, wider, "norm.weight", "(40,)", "(41,)", "another architecture")
    more = build()[0]
    more.register_buffer("more", torch.zeros(1))
    misfit(trained, more, "more", "missing from the file")
    less = build()[0]
    del less.flags
    misfit(trained, less, "flags", "no such parameter or buffer")
    taller = build()[0]
    taller.up = rarefy.SparseLinear(24, 48, density=0.2)
    misfit(trained, taller, "up", "(40, 24) in the file, (48, 24) in the model")


def test_another_dtype(trained: Path) -> None:
    misfit(trained, build()[0].double(), "float32 in the file", "float64 in the model", "model.to(torch.float32)")


def test_a_model_without_memory(trained: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model: Any = Net()
    rarefy.sparsify(model, PLAN)
    with pytest.raises(ValueError, match="to_empty"):
        rarefy.load_into(trained, model)
    model.to_empty(device="cpu")
    found = rarefy.load_into(trained, model)
    assert isinstance(found, Checkpoint) and found.extra == {"position": 10}
    assert torch.equal(model.up.values, found.tensors["up.values"]) and model.up.pattern == found.patterns["up"]
    assert torch.isfinite(model(torch.randn(2, 24))).all()


def test_equal_k_but_another_pattern_loads_9_3(trained: Path) -> None:
    model, *_ = build(seed=9)
    found = rarefy.load(trained)
    model.up.set_pattern(rarefy.Pattern.with_units((40, 24), model.up.num_units, generator=torch.Generator()))
    assert model.up.pattern != found["up.pattern"]
    rarefy.load_into(trained, model)
    assert model.up.pattern == found["up.pattern"]


def test_training_state_that_is_missing_or_does_not_fit(trained: Path, tmp_path: Path) -> None:
    model, rewirer, optimizer = build(seed=4)
    train(model, optimizer, 0, 5)
    rarefy.save(model, tmp_path / "bare.safetensors")
    misfit(tmp_path / "bare.safetensors", model, "no rewiring state", rewirer=rewirer)
    misfit(tmp_path / "bare.safetensors", model, "no optimizer state", optimizer=optimizer)
    other_class = torch.optim.AdamW(model.parameters())
    misfit(trained, model, "rarefy.AdamW", "torch.AdamW", optimizer=other_class)
    reverse = rarefy.AdamW(list(model.parameters())[::-1])
    misfit(trained, model, "up.values where this one has tied.bias", optimizer=reverse)
    groups = rarefy.AdamW(rarefy.param_groups(model, lr=0.1, weight_decay=0.1))
    misfit(trained, model, "groups of", optimizer=groups)


def test_an_engine_that_refuses_leaves_model_and_optimizer_alone(trained: Path) -> None:
    model, rewirer, optimizer = build(seed=4, plan=rarefy.Plan(density=0.2, method=rarefy.SET(), keep_dense=("head",)))
    train(model, optimizer, 0, 5)
    misfit(trained, model, "method 'rigl'", "'set'", rewirer=rewirer, optimizer=optimizer)
    train(model, optimizer, 5, 12)


# -- the format page --------------------------------------------------------------------------------------------------


def test_the_reader_on_the_format_page(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    source = page.split("```python\n")[1].split("```")[0]
    assert len(source.splitlines()) <= 50
    reader: dict[str, Any] = {}
    exec(source, reader)
    torch.manual_seed(1)
    model = nn.ModuleDict(
        {
            "plain": rarefy.SparseLinear(24, 40, density=0.2),
            "blocks": rarefy.SparseLinear(24, 40, density=0.2, block=(4, 2), bias=False),
            "short": rarefy.SparseLinear(16, 8, density=0.5, dtype=torch.bfloat16),
            "norm": nn.LayerNorm(3),
        }
    )
    model["again"] = model["plain"]
    optimizer = rarefy.AdamW(model.parameters())
    rarefy.save(model, tmp_path / "a.safetensors", optimizer=optimizer, extra={"x": torch.tensor(1.5).bfloat16()})

    arrays, layers = reader["read"](tmp_path / "a.safetensors")

    for name in ("plain", "blocks", "short", "again"):
        layer = model[name]
        assert isinstance(layer, rarefy.SparseLinear)
        assert (reader["dense"](name, arrays, layers) == layer.dense_weight().float().numpy()).all()
        assert _digest_as_described(arrays, layers, name) == layers[name]["digest"] == layer.pattern.digest()
    assert (arrays["norm.weight"] == 1).all() and arrays["extra.x"] == 1.5

    raw = bytearray((tmp_path / "a.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(AssertionError, match="was changed"):
        reader["read"](tmp_path / "a.safetensors")


def _digest_as_described(arrays: dict[str, np.ndarray], layers: dict[str, Any], name: str) -> str:
    (rows, cols), (b_r, b_c) = layers[name]["shape"], layers[name]["block"]
    text = f"({rows}, {cols}) ({b_r}, {b_c})".encode()
    indices = [arrays[f"{name}.{part}"].astype("<i4").tobytes() for part in ("crow_indices", "col_indices")]
    return hashlib.sha256(b"".join([text, *indices])).hexdigest()


def test_trees_as_the_page_describes_them() -> None:
    tensors: dict[str, Tensor] = {}
    node = tree.encode({"b": (1,), "a": {1: torch.ones(1)}, "c": float("inf")}, "extra", tensors)
    assert json.dumps(node) == (
        '{"a": {"$dict": [[1, {"$tensor": "extra.a.1"}]]}, "b": {"$tuple": [1]}, "c": {"$float": "inf"}}'
    )
    assert list(tensors) == ["extra.a.1"] and tree.tensor_names(node) == {"extra.a.1"}


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_state_lies_in_memory_as_its_parameter_does(tmp_path: Path, fused: bool) -> None:
    """Fused optimizers pair entries by their place in memory: of a channels_last weight not the order of a file."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Conv2d(3, 4, 3)
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    x = torch.randn(2, 3, 8, 8)
    model, optimizer = fresh()
    step(model, optimizer)
    rarefy.save(model, tmp_path / "x.safetensors", optimizer=optimizer)
    again, resumed = fresh()
    rarefy.load_into(tmp_path / "x.safetensors", again, optimizer=resumed)
    for _ in range(2):
        step(model, optimizer)
        step(again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
