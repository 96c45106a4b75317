"""Sparse against dense at 1 to 16 tokens, and a whole GPT that writes text: the tables of docs/results.md, "Inference".

A contender is a set of layers that are called in turn, so many that their dense weights are larger than the caches
(`--gib`). Contenders take turns in rounds. Before its turn in `--cold` rounds, a buffer of that size is read, so that
sparse weights come from memory too; otherwise they may still lie in a large shared cache, as they do when a model runs.
Usage: python tools/time_inference.py layers|generate [--help]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rarefy
from rarefy.models import GPT, GPTConfig, timed_generate
from rarefy.nn import SparseLinear
from rarefy.ops import library

DENSITY = 0.1


def block_of(text: str) -> int | tuple[int, int]:
    """`4` or `4x1`."""
    sizes = [int(part) for part in text.split("x")]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def rounds(contenders: dict[str, Callable[[], float]], num: int) -> dict[str, list[float]]:
    """Seconds of each in each round, every second round in the opposite order; one round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for at in range(num + 1):
        for name in contenders if at % 2 else reversed(contenders):
            took = contenders[name]()
            if at:
                seconds[name].append(took)
    return seconds


def against(dense: list[float], other: list[float]) -> str:
    """Median and quartiles of the ratio within a round."""
    low, middle, high = statistics.quantiles((d / o for d, o in zip(dense, other, strict=True)), n=4)
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def sweep(layers: list[nn.Module], x: Tensor, evict: Tensor | None) -> float:
    """Seconds a call."""
    if evict is not None:
        evict.sum()
    begin = time.perf_counter()
    for layer in layers:
        layer(x)
    return (time.perf_counter() - begin) / len(layers)


def time_layers(options: argparse.Namespace) -> None:
    """One line for each shape and number of tokens."""
    evict = torch.ones(int(options.gib * 2**28)) if options.cold else None
    for shape in options.shapes:
        out_features, in_features = (int(size) for size in shape.split("x"))
        count = max(4, round(options.gib * 2**30 / (4 * out_features * in_features)))
        sets: dict[str, list[nn.Module]] = {"fp32": [nn.Linear(in_features, out_features) for _ in range(count)]}
        if options.bf16:
            sets["bf16"] = [nn.Linear(in_features, out_features, dtype=torch.bfloat16) for _ in range(count)]
        for block in options.blocks:
            shape_of = {"density": DENSITY, "block": block_of(block)}
            sets[block] = [SparseLinear(in_features, out_features, **shape_of) for _ in range(count)]
        for tokens in options.tokens:
            x = torch.randn(tokens, in_features)
            inputs = {name: x.bfloat16() if name == "bf16" else x for name in sets}
            contenders = {name: functools.partial(sweep, sets[name], inputs[name], evict) for name in sets}
            taken = rounds(contenders, options.rounds)
            line = f"{shape} x{count} {'cold ' if options.cold else ''}{tokens:2d} tokens"
            for name, seconds in taken.items():
                line += f" | {name} {statistics.median(seconds) * 1e3:.3f} ms"
                line += "" if name == "fp32" else f" {against(taken['fp32'], seconds)}"
            print(line, flush=True)


def time_generate(options: argparse.Namespace) -> None:
    """Random weights: what a byte costs does not depend on them."""
    config = GPTConfig(width=options.width, layers=options.layers, heads=options.width // 64, context=options.context)
    models = {"dense": GPT(config)}
    for block in options.blocks:
        models[block] = GPT(config)
        plan = rarefy.Plan(density=DENSITY, block=block_of(block), distribution="uniform", keep_dense=("head",))
        rarefy.sparsify(models[block], plan)
    prompt = bytes(range(32, 32 + 64))
    prefill: dict[str, list[float]] = {name: [] for name in models}

    def run(name: str) -> float:
        made = timed_generate(models[name], prompt, options.bytes)
        prefill[name].append(made.prompt_s)
        return made.decode_s / (options.bytes - 1)

    decode = rounds({name: functools.partial(run, name) for name in models}, options.rounds)
    for name in models:
        read, wrote = prefill[name][1:], decode[name]
        print(
            f"{name}: prompt {len(prompt) / statistics.median(read):,.0f} bytes/s {against(prefill['dense'][1:], read)}"
            f" | written {1 / statistics.median(wrote):,.1f} bytes/s {against(decode['dense'], wrote)}"
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    layers = kinds.add_parser("layers", help="single layers")
    layers.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008", "8192x8192"])
    layers.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    layers.add_argument("--gib", type=float, default=1.0, help="dense fp32 weights of a set of layers")
    layers.add_argument("--cold", action="store_true", help="read that much between turns")
    layers.add_argument("--bf16", action="store_true", help="time dense bf16 too")
    layers.set_defaults(run=time_layers)
    whole = kinds.add_parser("generate", help="a whole model")
    for name, default in (("width", 1024), ("layers", 8), ("context", 512), ("bytes", 100)):
        whole.add_argument(f"--{name}", type=int, default=default)
    whole.set_defaults(run=time_generate)
    for kind in (layers, whole):
        kind.add_argument("--blocks", nargs="+", default=["1", "4x1", "8x1", "4", "8", "16"])
        kind.add_argument("--rounds", type=int, default=7)
        kind.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {library.isa()}, density {DENSITY}", flush=True)
    with torch.inference_mode():
        options.run(options)


if __name__ == "__main__":
    main()
