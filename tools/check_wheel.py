"""Check a built wheel as a user meets it: its name, what it links, and training from it where there is no compiler.

Makes a new environment in a temporary folder, installs torch as constraints.txt pins it and then the wheel, and runs a
few training steps on the kernels. Linux only. Usage: python tools/check_wheel.py dist/rarefy-*.whl
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

LIBRARY = "rarefy/librarefy_kernels.so"
SYSTEM_LIBRARIES = (
    "libc.so",
    "libm.so",
    "libpthread.so",
    "libdl.so",
    "librt.so",
    "ld-linux",
    "libgcc_s.so",
    "libstdc++.so",
    "libgomp.so.1",
)
FOREIGN_SYMBOLS = (
    "Py",
    "_Py",
    "_ZN2at",
    "_ZN3c10",
    "_ZN5torch",
    "aoti_torch",
)  # C and mangled C++ names of Python and torch

TRAINING = """
import pathlib, shutil, sys
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja"))), "a compiler is in reach"

import torch, rarefy
from rarefy.ops import backend, library

assert sys.prefix in rarefy.__file__, f"imported from elsewhere: {rarefy.__file__}"
assert library.isas(), "the wheel has no kernels that run here"

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.2, method=rarefy.RigL(interval=2, stagger=False)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rewirer.attach(optimizer, total_steps=16)
x, target = torch.randn(50, 96), torch.randn(50, 32)
losses = []
for isa in library.isas():
    with backend.using(isa):
        for _ in range(16 // len(library.isas())):
            loss = torch.nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert any(record["changed"] for record in rewirer.history), "nothing was rewired"

loaded = {pathlib.Path(line.split()[-1]) for line in pathlib.Path("/proc/self/maps").read_text().splitlines()}
runtimes = {str(path) for path in loaded if path.name.startswith(("libgomp", "libomp", "libiomp"))}
assert len(runtimes) == 1, f"OpenMP libraries loaded: {sorted(runtimes)}"
print(f"trained on {', '.join(library.isas())}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; OpenMP from {runtimes.pop()}")
"""


def name_faults(wheel: Path) -> list[str]:
    """What is wrong with the tag: it must fit every Python 3 and every Linux that is not too old."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    fits = (python, abi) == ("py3", "none") and platform.startswith("manylinux")
    return [] if fits else [f"the tag is {python}-{abi}-{platform}, not py3-none-manylinux..."]


def content_faults(wheel: Path) -> list[str]:
    """What is wrong inside: one library, no second OpenMP runtime beside it, nothing but the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        binaries = [name for name in names if ".so" in Path(name).name]
        if binaries != [LIBRARY]:
            return [f"the compiled files are {binaries}, not just {LIBRARY}"]
        faults = binary_faults(archive.read(LIBRARY))
    return faults + [
        f"{name} does not belong in a wheel" for name in names if not name.startswith(("rarefy/", "rarefy-"))
    ]


def binary_faults(elf: bytes) -> list[str]:
    """What a shared library links or wants from elsewhere that it must not: torch, Python, its own OpenMP."""
    library = ELFFile(io.BytesIO(elf))
    dynamic = library.get_section_by_name(".dynamic")
    symbols = library.get_section_by_name(".dynsym")
    assert isinstance(dynamic, DynamicSection) and isinstance(symbols, SymbolTableSection)
    needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]  # pyright: ignore[reportAttributeAccessIssue]
    wanted = [symbol.name for symbol in symbols.iter_symbols() if symbol["st_shndx"] == "SHN_UNDEF"]
    return [
        *(f"links {name}" for name in needed if not name.startswith(SYSTEM_LIBRARIES)),
        *(f"wants the symbol {name}" for name in wanted if name.startswith(FOREIGN_SYMBOLS)),
    ]


def install_and_train(wheel: Path, constraints: Path) -> bool:
    """Whether training works from the wheel in a new environment whose PATH holds that environment only."""
    with tempfile.TemporaryDirectory(prefix="rarefy-wheel-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin/python")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PATH": str(python.parent), "CC": "none", "CXX": "none"}
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--constraint",
            constraints,
        ]
        for what in ("torch", wheel.resolve()):
            done = subprocess.run([*install, what], env=environment, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                return False
        for command in ([python, "-c", TRAINING], [python.parent / "rarefy", "--help"]):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(done.stdout + done.stderr, file=sys.stderr)
                return False
            print(done.stdout.splitlines()[0])
    return True


def main() -> int:
    """Check the one wheel named; 0 if nothing is wrong with it."""
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".whl"):
        print(__doc__, file=sys.stderr)
        return 2
    wheel = Path(sys.argv[1])
    faults = [*name_faults(wheel), *content_faults(wheel)]
    for fault in faults:
        print(f"{wheel.name}: {fault}", file=sys.stderr)
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    if faults or not install_and_train(wheel, constraints):
        return 1
    print(f"{wheel.name} is good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
