"""Peak memory of a training step, dense and sparse, each in a process of its own; and the largest network that fits.

    python tools/step_memory.py --width 1024 --density 0.1
    python tools/step_memory.py --fit 16 --density 0.1

What a process holds before there is a network (Python, torch) is subtracted. With few tokens what is left is what does
not depend on them: weights, gradients, optimizer state, indices, and what the step needs besides. Networks are made
layer by layer from the meta device, so that a sparse one is never dense.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import warnings
from typing import Any

GIB = 2**30

INTERVAL, STEPS = 20, 24
"""Layers take turns, so that every one rewires once in the steps, one or two at a time, as in a real run."""

EVERY = 128
"""Widths tried are multiples of this."""


def peak_bytes() -> int:
    """The most that this process has held so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shape(asked: argparse.Namespace, density: float, width: int) -> Any:
    """The network on the meta device, its engine if it is sparse, and its optimizer."""
    import torch

    import rarefy
    from rarefy.models import GPT, GPTConfig

    heads = max(1, width // 64)
    with torch.device("meta"):
        model = GPT(GPTConfig(width=width, layers=asked.layers, heads=heads, context=asked.context))
    model.recompute = asked.recompute
    rewirer = None
    if density < 1:
        method = rarefy.RigL(interval=INTERVAL) if asked.method == "rigl" else rarefy.SET(interval=INTERVAL)
        block = tuple(asked.block) if len(asked.block) > 1 else asked.block[0]
        plan = rarefy.Plan(density=density, block=block, method=method, keep_dense=("head",))
        rewirer = rarefy.sparsify(model, plan)
    return model, rewirer


def train(asked: argparse.Namespace, density: float, width: int) -> dict[str, Any]:
    """A few steps. Bytes above what was held before."""
    import torch
    from torch.nn import functional as F

    import rarefy
    from rarefy.cost import training_bytes
    from rarefy.ops import library

    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    library.isas()
    held = peak_bytes()
    model, rewirer = shape(asked, density, width)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    model.reset_parameters(generator)
    for layer in rewirer.layers.values() if rewirer else ():
        layer.reset_parameters(generator)
    ours = rewirer is not None and asked.optimizer == "rarefy"
    optimizer = rarefy.AdamW(model.parameters()) if ours else torch.optim.AdamW(model.parameters(), foreach=False)
    if rewirer is not None:
        rewirer.attach(optimizer, total_steps=100)
    tokens = torch.zeros(asked.batch, asked.context, dtype=torch.int64)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=asked.bf16):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(p.numel() for p in model.parameters())
    linears = 12 * width**2 * asked.layers
    return {
        "width": width, "density": density, "weights": weights, "as_if_dense": linears + 256 * 2 * width,
        "peak": peak_bytes() - held, "held": sum(training_bytes(model, optimizer).values()),
        "rewires": len(rewirer.history) if rewirer else 0,
    }  # fmt: skip


def measure(asked: argparse.Namespace, density: float, width: int) -> dict[str, Any]:
    """`train` in a process of its own. Raises RuntimeError when it was killed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(density), str(width)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"width {width} at density {density:g} ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def largest(asked: argparse.Namespace, density: float) -> dict[str, Any]:
    """The widest network whose step stays within --fit GiB: guessed from a narrower one's peak, then measured."""
    limit, width = asked.fit * GIB, asked.width
    best = measure(asked, density, width)
    tried = {width}
    while True:
        guess = int(best["width"] * (limit / best["peak"]) ** 0.5) // EVERY * EVERY
        if guess in tried:
            return best
        tried.add(guess)
        found = measure(asked, density, guess)
        print(f"  width {guess}: peak {found['peak'] / GIB:.2f} GiB", flush=True)
        if found["peak"] > limit:
            tried |= set(range(guess, guess + EVERY))
            guess -= EVERY
            if guess in tried:
                return best
            tried.add(guess)
            found = measure(asked, density, guess)
            print(f"  width {guess}: peak {found['peak'] / GIB:.2f} GiB", flush=True)
        if found["peak"] <= limit and found["width"] > best["width"]:
            best = found
        else:
            return best


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--density", type=float, nargs="+", default=[0.1])
    parser.add_argument("--method", choices=["rigl", "set"], default="rigl")
    parser.add_argument("--optimizer", choices=["rarefy", "torch"], default="rarefy", help="of the sparse network")
    parser.add_argument("--block", type=int, nargs="+", default=[1], help="side of the units, or outputs and inputs")
    parser.add_argument("--recompute", action="store_true", help="run blocks again in the backward pass")
    parser.add_argument("--bf16", action="store_true", help="activations in bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", type=float, help="GiB: look for the widest network instead")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(train(asked, float(asked.one[0]), int(asked.one[1]))))
        return
    if asked.fit:
        for density in (1.0, *asked.density):
            found = largest(asked, density)
            print(
                f"density {density:g}: width {found['width']}, {found['as_if_dense'] / 1e6:,.0f} M weights as if "
                f"dense, {found['weights'] / 1e6:,.0f} M stored, peak {found['peak'] / GIB:.2f} GiB"
            )
        return
    dense = measure(asked, 1.0, asked.width)
    print(f"dense: peak {dense['peak'] / 2**20:,.0f} MiB, of which held between steps {dense['held'] / 2**20:,.0f}")
    for density in asked.density:
        found = measure(asked, density, asked.width)
        print(
            f"density {density:g}: peak {found['peak'] / 2**20:,.0f} MiB, of which held {found['held'] / 2**20:,.0f}; "
            f"{found['peak'] / dense['peak']:.3f} of dense ({found['held'] / dense['held']:.3f} held); "
            f"{found['rewires']} rewires"
        )


if __name__ == "__main__":
    main()
