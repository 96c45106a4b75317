"""Time causal attention beside torch's, as a GPT calls them: from the projection's output to the input of the next.

Rounds are interleaved; medians. GFLOP/s count what lies on or below the diagonal: 2 T (T + 1) c for each head forward,
2.5 times as many backward. Usage: python tools/time_attention.py [BxHxTxc ...] [--seconds 8] [--dtype bfloat16]
With AVX2 on both sides: RAREFY_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from rarefy.cost import Lap, interleaved
from rarefy.ops import causal_attention, library
from rarefy.ops.attention import reference

SHAPES = ["8x8x256x64", "8x16x256x64", "2x8x1024x64"]


def laps(attend: Callable[[Tensor], Tensor], qkv: Tensor, dout: Tensor) -> list[Lap]:
    """Forward, then backward of what it left. qkv is a view of (B, T, 3 C), out becomes (B, T, C)."""
    B, T, three, H, c = qkv.shape
    projected = qkv.reshape(B, T, three * H * c).requires_grad_()
    dout = dout.reshape(B, T, H * c)
    out: list[Tensor] = []

    def forward() -> None:
        out[:] = [attend(projected.view(B, T, three, H, c)).reshape(B, T, H * c)]

    def backward() -> None:
        projected.grad = None
        out[0].backward(dout)

    return [forward, backward]


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="batch x heads x tokens x head_dim")
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long a shape may take")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    print(f"{library.isa()}, torch on {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for shape in options.shapes:
        B, H, T, c = map(int, shape.split("x"))
        qkv, dout = torch.randn(B, T, 3, H, c), torch.randn(B, T, H, c)
        qkv, dout = (tensor.to(getattr(torch, options.dtype)) for tensor in (qkv, dout))
        groups = [laps(attend, qkv, dout) for attend in (causal_attention, reference)]
        ours, theirs = interleaved(groups, budget_s=options.seconds, rounds=1000)
        both = [[sum(ms) for ms in zip(*times, strict=True)] for times in (ours, theirs)]
        flops = 2 * B * H * T * (T + 1) * c
        print(shape, f"{len(both[0])} rounds")
        for name, work, mine, torchs in (
            ("forward", flops, ours[0], theirs[0]),
            ("backward", 2.5 * flops, ours[1], theirs[1]),
            ("both", 3.5 * flops, *both),
        ):
            ratios = statistics.quantiles([b / a for a, b in zip(mine, torchs, strict=True)], n=4)
            a, b = statistics.median(mine), statistics.median(torchs)
            rate = f"{work / a / 1e6:.0f} GFLOP/s"
            spread = f"{ratios[1]:.2f}x ({ratios[0]:.2f}-{ratios[2]:.2f})"
            print(f"  {name:8} {a:7.2f} ms ({rate}), torch {b:7.2f} ms: {spread}")


if __name__ == "__main__":
    main()
