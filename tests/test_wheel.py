"""What is installed: what the library links, which OpenMP runtime it uses, and the package built without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from check_wheel import binary_faults, content_faults, name_faults
from rarefy.ops import library

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "csrc", "pyproject.toml", "src")

needs_kernels = pytest.mark.skipif(not library.isas(), reason="this installation has no compiled kernels")


def library_path() -> Path:
    """The library that this process has loaded."""
    assert library.isas()
    (path,) = {
        Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if library.LIBRARY in line
    }
    return path


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_library_links_neither_torch_nor_python():
    assert binary_faults(library_path().read_bytes()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_a_library_that_links_python_is_found_out():
    import math  # an extension module: it wants Python's symbols

    if not getattr(math, "__file__", None):
        pytest.skip("this Python has its standard library built in")
    assert any("wants the symbol Py" in fault for fault in binary_faults(Path(math.__file__).read_bytes()))


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    program = """
import pathlib, torch, rarefy
layer = rarefy.SparseLinear(64, 64, density=0.5)
layer(torch.randn(32, 64)).sum().backward()
loaded = {pathlib.Path(line.split()[-1]) for line in pathlib.Path("/proc/self/maps").read_text().splitlines()}
print(*(path for path in loaded if path.name.startswith(("libgomp", "libomp", "libiomp"))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


def test_import_brings_in_nothing_slow():
    program = """
import sys, numpy, torch
before = set(sys.modules)
import rarefy
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    slow = {"jinja2", "plotly", "pydantic", "rich", "scipy", "transformers", "tyro"}
    assert not slow & set(done.stdout.split())


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel of this tree's sources, built in `folder` with a compiler that does not exist."""
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    settings = {
        name: value for name, value in os.environ.items() if name not in ("RAREFY_REQUIRE_NATIVE", "CMAKE_ARGS")
    }
    settings |= {"CC": "no-such-compiler", "CXX": "no-such-compiler", **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)


def needs_build_tools():
    pytest.importorskip("scikit_build_core", reason="needs the build tools: make .venv/torch")


@pytest.mark.slow
def test_without_a_compiler_a_pure_package_is_built_and_trains(tmp_path: Path):
    needs_build_tools()
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert name_faults(wheel) and content_faults(wheel)  # the check of the real wheel would not let it pass

    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = """
import sys, torch, rarefy
assert rarefy.__file__.startswith(sys.argv[1]), rarefy.__file__
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.25, method=rarefy.RigL(interval=2)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rewirer.attach(optimizer, total_steps=8)
for _ in range(8):
    optimizer.zero_grad()
    model(torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
"""
    # -S keeps an editable installation of this tree from standing in for the one that was built.
    installed = str(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((installed, SITE_PACKAGES))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, installed], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no compiled kernels") == 1, done.stderr


@pytest.mark.slow
def test_a_build_that_requires_the_kernels_fails_without_a_compiler(tmp_path: Path):
    needs_build_tools()
    done = build(tmp_path, RAREFY_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stdout + done.stderr
    assert not list(tmp_path.glob("dist/*.whl"))
