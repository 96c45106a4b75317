"""The Triton kernels compile for GPUs that are not here, into what makes them fast: tools/compile_kernels.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

TOOL = Path(__file__).parent.parent / "tools" / "compile_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, blocks", [(90, ["16", "128"]), (90, ["64x1"]), (80, ["64"])], ids=["hopper", "hopper-panels", "ampere"]
)
def test_kernels_compile_for(target, blocks, tmp_path):
    """Odd token counts do not cost whole vectors: the products on tensor cores read by asynchronous copies."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    wanted = ["--first", "--target", str(target), "--tokens", "1001", "--dtypes", "bfloat16", "--blocks", *blocks]
    made = subprocess.run(
        [sys.executable, str(TOOL), *wanted], capture_output=True, text=True, env=env, timeout=200, check=False
    )
    assert made.returncode == 0, made.stdout + made.stderr
    products = [line for line in made.stdout.splitlines() if line.startswith(("product_kernel", "sddmm_kernel"))]
    assert len(products) >= 2 * len(blocks)
    in_eight_bits = sum(int(re.search(r" fp8 +(\d+)", line)[1]) > 0 for line in products)  # type: ignore[index]
    assert in_eight_bits == (0 if target < 89 or "x1" in blocks[0] else 2 * len(blocks))
    by_tensor_cores = "wgmma" if target == 90 else "mma"
    for line in products:
        figures = dict(re.findall(r"(registers|spilled|wgmma|mma|cp\.async|in flight) +(\d+)", line))
        assert int(figures["in flight"]) > 0, line
        assert int(figures[by_tensor_cores]) > 0 and int(figures["cp.async"]) > 0 and int(figures["spilled"]) == 0, line
