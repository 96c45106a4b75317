"""Compile the Triton kernels for GPUs that need not be here, and say what each tile choice costs there.

Runs every operation once on the CPU with the launches replaced by compilations, so that the kernels are compiled with
the arguments they are really launched with: registers, spilled bytes, shared memory, and whether tensor cores and
asynchronous copies are used. Exits with 1 if a kernel does not compile, or none of its tiles fits the GPU.

    python tools/compile_kernels.py --target 90 --blocks 64 128x1 --dtypes bfloat16
    python tools/compile_kernels.py --first    # one choice of tiles for each kernel: seconds, not minutes
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a program may use, by compute capability."""

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint16: "u16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Built:
    """One kernel with one choice of tiles."""

    name: str
    tiles: dict[str, Any]
    shared_bytes: int
    registers: int
    spilled_bytes: int
    """A thread's stack, which holds what found no register."""
    wgmma: int
    mma: int
    fp8: int
    """Of both, those of 8-bit floats."""
    async_copies: int
    in_flight: int
    """Copies that the inner loop leaves under way while it computes; 0: it waits for all of them."""
    narrow_loads: int
    """Loads of one or two bytes from global memory: indices, or a tile whose rows are not aligned."""

    def __str__(self) -> str:
        tiles = " ".join(f"{key}={value}" for key, value in self.tiles.items())
        return (
            f"{self.name:22} {tiles:56} registers {self.registers:3} spilled {self.spilled_bytes:5} "
            f"shared {self.shared_bytes >> 10:3}K wgmma {self.wgmma:3} mma {self.mma:3} fp8 {self.fp8:3} "
            f"cp.async {self.async_copies:3} "
            f"in flight {self.in_flight:2} narrow {self.narrow_loads:3}"
        )


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as Triton's launcher would have them."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for at, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = True  # as torch's allocator on a GPU has it
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(at,)] = value
            continue
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def build(kernel: Any, arguments: dict[str, Any], config: Any, capability: int) -> Built:
    """Compile for one GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(kernel, {**arguments, **config.kwargs})
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    return Built(
        kernel.fn.__name__,
        {**config.kwargs, "warps": config.num_warps, "stages": config.num_stages},
        made.metadata.shared,
        int(found[1]),
        int(found[2]),
        len(re.findall(r"wgmma\.mma_async", ptx)),
        len(re.findall(r"mma\.sync", ptx)),
        len(re.findall(r"mma\S*\.e4m3", ptx)),
        len(re.findall(r"cp\.async\.c[ag]", ptx)),
        max([int(num) for num in re.findall(r"async_wait .*?num = (\d+)", made.asm["ttgir"])], default=0),
        len(re.findall(r"ld\.global(?:\.\w+)*\.b(?:8|16)\b", ptx)),
    )


def run_all(blocks: list[tuple[int, int]], dtypes: list[torch.dtype], tokens: int, *, eight_bits: bool) -> None:
    """Every operation once, and products of square blocks again in fp8 if the GPU multiplies it."""
    from rarefy import Pattern
    from rarefy.init import two_four_pattern
    from rarefy.ops import Index, fp8
    from rarefy.ops.triton import adamw, is_square, operations, two_four

    fours = Index.of(two_four_pattern((1024, 1024), 1 << 19))
    for dtype in dtypes:
        if dtype in two_four.HALVES:
            print(f"\ntwo in four, {str(dtype).removeprefix('torch.')}")
            values = torch.zeros(fours.num_units, dtype=dtype)
            two_four.expand(values, fours.cols, None, fours.out_features)
            two_four.expand(values, fours.t_rows, fours.t_perm, fours.in_features)
    for block in blocks:
        side = 1024
        index = Index.of(Pattern.random((side, side), 0.1, block, torch.Generator().manual_seed(0)))
        for dtype in dtypes:
            print(f"\nblocks of {block[0]}x{block[1]}, {str(dtype).removeprefix('torch.')}")
            values = torch.zeros(index.num_units, *block, dtype=dtype)
            x, dy = torch.zeros(tokens, side, dtype=dtype), torch.zeros(tokens, side, dtype=dtype)
            operations.spmm(values, index, x, torch.zeros(side, dtype=dtype))
            operations.spmm_backward(values, index, dy, x, [True, True, True])
            operations.grow_candidates(index, dy, x, 10)
            gradient, m, v = (torch.zeros_like(values) for _ in range(3))
            tables, age = (torch.zeros(2), torch.zeros(2)), torch.zeros(index.num_units, dtype=torch.int32)
            settings = {"decay": 0.9, "betas": (0.9, 0.99), "eps": 1e-8, "keys": (1, 2, 3)}
            adamw.update(values, gradient, m, v, age, tables, **settings)
            for layers in (2, 3) if is_square(list(block)) else ():
                matrices = [(values, index)] * layers
                _, z = operations.mlp(matrices, x, [None] * layers, 0, dtype)
                operations.mlp_backward(matrices, dy, x, z, 0, [True] * (1 + 2 * layers))
            if eight_bits and is_square(list(block)) and dtype != torch.float32:
                print("in fp8")
                with mock.patch.object(fp8, "why_not", return_value=None), fp8.fp8_products():
                    operations.spmm(values, index, x, torch.zeros(side, dtype=dtype))
                    operations.spmm_t(values, index, dy)


def compiling(capability: int, *, first: bool, failures: list[str]) -> Callable[..., None]:
    """What takes the place of `Tuned.launch`."""
    seen: set[str] = set()

    def launch(kernel: Any, grid: Any, *positional: Any, **constants: Any) -> None:
        names = [p.name for p in kernel.kernel.params]
        arguments = dict(zip(names, positional, strict=False)) | constants
        configs = kernel.configs[:1] if first else kernel.configs
        fits = False
        for config in configs:
            try:
                built = build(kernel.kernel, arguments, config, capability)
            except Exception as error:  # whatever the compiler says, the next is tried
                failures.append(f"{kernel.name} {config}: {type(error).__name__}: {str(error)[:2000]}")
                continue
            fits = fits or built.shared_bytes <= SHARED_BYTES[capability]
            if str(built) not in seen:
                print(built)
            seen.add(str(built))
        if not fits and not first:
            failures.append(f"{kernel.name}: no tiles fit")

    return launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, default=90, choices=SHARED_BYTES, help="compute capability, times 10")
    parser.add_argument("--blocks", nargs="+", default=["16", "32", "64", "128", "64x1", "128x1"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--first", action="store_true", help="the first tiles of every kernel only")
    options = parser.parse_args()

    from rarefy.ops import fp8
    from rarefy.ops.triton import interpreted
    from rarefy.ops.triton.tuning import Tuned

    if interpreted():
        print("TRITON_INTERPRET=1 is set: nothing would be compiled", file=sys.stderr)
        return 1
    failures: list[str] = []
    Tuned.launch = compiling(options.target, first=options.first, failures=failures)
    blocks = [tuple(int(side) for side in name.split("x")) for name in options.blocks]
    run_all(
        [(sides[0], sides[-1]) for sides in blocks],
        [getattr(torch, name) for name in options.dtypes],
        options.tokens,
        eight_bits=divmod(options.target, 10) >= fp8.CAPABILITY,
    )
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
