"""Methods on another device than the CPU, which `pretend_gpu` stands in for where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_method_and_signal_ends_elsewhere_as_on_the_cpu():
    """And mixes no devices: the process tells. It is one of its own, as torch keeps a device type for good."""
    script = Path(__file__).parent / "pretend_gpu.py"
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    lines = made.stdout.splitlines()
    assert made.returncode == 0, made.stdout + made.stderr
    assert len(lines) == 36 and all(line.endswith("as on the CPU") for line in lines)
