"""Does the best learning rate of a small dense network carry over to a wide sparse one?

Trains a dense GPT of --base-width and a sparse one of --width at each rate of a grid, the wide one with the rates that
are usual (the same for all parameters) and with SuPar's, and keeps the validation loss of each run. The file named is
read first: what is in it is not trained again, so the command may be stopped and repeated, or cut by --limit-s.
Usage: python tools/rate_transfer.py --data TEXT --out FILE.json [--rates 1e-3 2e-3 ...] [--limit-s 90]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch

from rarefy.files import atomic_write
from rarefy.methods import registered
from rarefy.plan import Plan
from rarefy.recipes.text import TextSettings
from rarefy.recipes.text.networks import make_dense, make_sparse
from rarefy.recipes.text.task import batches
from rarefy.training.data import load_corpus
from rarefy.training.loop import LoopSettings
from rarefy.training.twin import Diverged

CONTENDERS: dict[str, tuple[bool, Literal["standard", "mup"]]] = {
    "small dense": (False, "standard"),
    "wide standard": (True, "standard"),
    "wide mup": (True, "mup"),
}
"""Name -> whether it is the wide sparse network, and its parametrization. At the base they are the same."""


def settings_of(options: argparse.Namespace, contender: str, lr: float) -> TextSettings:
    """The settled settings of a run."""
    wide, parametrization = CONTENDERS[contender]
    width = options.width if wide else options.base_width
    plan = Plan(density=options.density, keep_dense=("head",), method=registered()[options.method]())
    given = TextSettings(
        data=options.data, steps=options.steps, plan=plan, width=width, layers=options.layers,
        heads=width // options.head, context=options.context, batch=options.batch, eval_bytes=options.eval_bytes,
        parametrization=parametrization, base_width=options.base_width, lr=lr, dense_lr=lr,
        sparse_lr=lr if parametrization == "standard" else None, seed=options.seed, interval=options.interval,
    )  # fmt: skip
    return given.settled(options.steps)


def train(settings: TextSettings, sparse: bool) -> float | None:
    """Validation loss at the end, nats a byte; None: it diverged."""
    twin = make_sparse(settings, settings.plan) if sparse else make_dense(settings)
    data, windows = batches(settings, load_corpus(settings.data, context=settings.context))
    assert settings.steps is not None and settings.warmup is not None and settings.eval_interval is not None
    loop = LoopSettings(
        steps=settings.steps, warmup=settings.warmup, eval_interval=settings.eval_interval, tokens_per_step=0
    )
    try:
        for step in range(1, settings.steps + 1):
            twin.train_step(data, rate=loop.rate(step), clip=settings.clip)
    except Diverged:
        return None
    loss = twin.evaluate(windows)
    return loss if math.isfinite(loss) else None


def verdict(found: dict[str, dict[str, float | None]]) -> list[str]:
    """The table, each contender's best rate, and what the small one's best rate costs the wide one."""
    rates = sorted({float(rate) for losses in found.values() for rate in losses})
    lines = ["| network | " + " | ".join(f"{rate:g}" for rate in rates) + " | best |", "|---" * (len(rates) + 2) + "|"]
    best: dict[str, float] = {}
    for name, losses in found.items():
        known = {float(rate): loss for rate, loss in losses.items() if loss is not None}
        if not known:
            continue
        best[name] = min(known, key=lambda rate: known[rate])
        cells = [f"{known[rate]:.3f}" if rate in known else "-" for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} | {best[name]:g} |")
    for name in found:
        losses = {float(rate): loss for rate, loss in found[name].items() if loss is not None}
        if name != "small dense" and best.get("small dense") in losses and name in best:
            cost = losses[best["small dense"]] - losses[best[name]]
            lines.append(f"{name} at the small one's best rate: {cost:+.3f} nats a byte against its own best")
    return lines


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of results, read first")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begin no further run after so many seconds")
    for name, kind, default in (
        ("base-width", int, 64), ("width", int, 256), ("layers", int, 4), ("head", int, 16), ("density", float, 0.1),
        ("method", str, "rigl"), ("interval", int, 12), ("steps", int, 250), ("batch", int, 8), ("context", int, 128),
        ("eval-bytes", int, 65536), ("seed", int, 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    options = parser.parse_args()
    about = {k: v for k, v in vars(options).items() if k not in ("out", "rates", "contenders", "limit_s", "data")}
    about |= {"text": Path(options.data).name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if kept and {**kept["settings"], "torch": "", "threads": 0} != {**about, "torch": "", "threads": 0}:
        raise SystemExit(f"{options.out} has results of other settings: {kept['settings']}; name another file")
    runs = kept.get("losses", {})
    began = time.monotonic()
    for name in options.contenders:
        for rate in options.rates:
            if f"{rate:g}" in runs.setdefault(name, {}) or time.monotonic() - began > options.limit_s:
                continue
            started = time.monotonic()
            loss = train(settings_of(options, name, rate), CONTENDERS[name][0])
            runs[name][f"{rate:g}"] = loss
            print(f"{name} at {rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}, ", end="")
            print(f"{time.monotonic() - started:.1f} s", flush=True)
            atomic_write(options.out, (json.dumps({"settings": about, "losses": runs}, indent=1) + "\n").encode())
    print("\n".join(verdict(runs)))


if __name__ == "__main__":
    main()
