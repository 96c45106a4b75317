"""Run folders made up from a formula: what a training run leaves, without training anything.

The figures are only plausible (a loss that falls, a faster sparse step, cosine churn); tests ask the report about these
files, never these files about the library.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES = {"attn.qkv": (768, 256), "attn.out": (256, 256), "mlp.up": (1024, 256), "mlp.down": (256, 1024)}
PARTS = {"forward": 0.33, "backward": 0.61, "optimizer": 0.04, "data": 0.02}


def write_run(
    folder: Path,
    *,
    name: str = "synthetic",
    steps: int = 2000,
    blocks: int = 4,
    twins: Sequence[str] = ("sparse", "dense"),
    method: str = "rigl",
    floor: dict[str, float] | None = None,
    step_s: dict[str, float] | None = None,
    nan_from: dict[str, int] | None = None,
    kinds: Sequence[str] = ("run", "train", "eval", "rewire", "time", "end"),
    empties: bool = False,
    seed: int = 0,
) -> Path:
    """Write a run folder.

    Args:
        steps: optimizer steps of every twin.
        blocks: transformer blocks, of four layers each.
        floor: bits per byte that a twin's loss falls towards.
        step_s: seconds per step of a twin.
        nan_from: step from which a twin's loss is NaN.
        kinds: kinds of records to write; without "end" the run looks as if it were still going.
        empties: whether rewires leave rows and columns empty.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    floor = {"sparse": 2.05, "dense": 2.0} | (floor or {})
    step_s = {"sparse": 0.044, "dense": 0.096} | (step_s or {})
    plan = _plan(blocks)
    records = [
        record for record in _records(plan, steps, twins, method, floor, step_s, nan_from or {}, empties, rng, name)
    ]
    lines = [json.dumps(record) for record in records if record["kind"] in kinds]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    (folder / "sample.txt").write_text(SAMPLE)
    (folder / "run.yaml").write_text("density: 0.1\nsteps: 2000\n")
    (folder / "summary.json").write_text(json.dumps({"id": name, "steps": steps}))
    return folder


def _plan(blocks: int) -> dict[str, Any]:
    layers = [_layer("embed", (256, 256), 1.0, "kept dense by keep_dense '*embed*'", None)]
    for block in range(blocks):
        for short, shape in SHAPES.items():
            small = short == "attn.out"
            reason = "sparse would be slower here: 0.412 ms against 0.305 ms dense" if small else ""
            layers.append(
                _layer(
                    f"blocks.{block}.{short}", shape, 1.0 if small else 0.1, reason, (0.412, 0.305) if small else None
                )
            )
    layers.append(_layer("head", (256, 256), 1.0, "kept dense by keep_dense '*head*'", None))
    totals: dict[str, Any] = {
        key: sum(layer[key] for layer in layers) for key in ("nnz", "bytes", "dense_bytes", "flops", "dense_flops")
    }
    sparse = [layer for layer in layers if layer["kind"] == "sparse"]
    totals["density"] = sum(layer["nnz"] for layer in sparse) / sum(math.prod(layer["shape"]) for layer in sparse)
    timed = [layer for layer in layers if layer["dense_ms"] is not None]
    totals["planned_ms"] = sum(layer["sparse_ms" if layer["kind"] == "sparse" else "dense_ms"] for layer in timed)
    totals["dense_ms"] = sum(layer["dense_ms"] for layer in timed)
    totals["speedup"] = totals["dense_ms"] / totals["planned_ms"]
    return {"layers": layers, "totals": totals | {"asked_density": 0.1}}


def _layer(
    name: str, shape: tuple[int, int], density: float, reason: str, timed: tuple[float, float] | None
) -> dict[str, Any]:
    size = math.prod(shape)
    nnz = round(size * density)
    dense_ms = size / 290_000
    sparse_ms, dense_ms = timed or (dense_ms * 0.37, dense_ms)
    kept = density == 1.0 and timed is None
    return {
        "name": name, "shape": list(shape), "kind": "dense" if density == 1.0 else "sparse", "reason": reason,
        "density": density, "block": [1, 1], "units": nnz, "nnz": nnz,
        "bytes": 4 * size if density == 1.0 else 10 * nnz, "dense_bytes": 4 * size,
        "flops": 6 * nnz, "dense_flops": 6 * size,
        "sparse_ms": None if kept else sparse_ms, "dense_ms": None if kept else dense_ms,
        "speedup": None if kept else dense_ms / sparse_ms,
    }  # fmt: skip


def _records(plan, steps, twins, method, floor, step_s, nan_from, empties, rng, name):
    size = sum(math.prod(layer["shape"]) for layer in plan["layers"])
    nnz = plan["totals"]["nnz"]
    about = []
    for twin in twins:
        held = size if twin.startswith("dense") else nnz
        parts = {
            "parameters": 4 * held,
            "gradients": 4 * held,
            "optimizer": 8 * held,
            "indices": 0 if held == size else 6 * held,
        }
        about.append(
            {
                "name": twin, "parameters": held, "nonzeros": held, "density": held / size,
                "flops_per_token": 6 * held, "training_bytes": parts,
            }
        )  # fmt: skip
    yield {
        "kind": "run", "id": name, "created": "2026-03-14T15:09:26+00:00", "twins": about,
        "machine": {"cpu": "Imaginary 2 cores", "isa": "avx2", "threads": 2, "torch": "2.13.0", "rarefy": "0.1.0"},
        "data": {"source": "python-stdlib", "digest": "0123abcd"},
        "command": ["rarefy", "train", "text", "--density", "0.1"],
        "settings": {
            "seed": 0, "steps": steps, "batch": 16, "context": 256, "learning_rate": 0.003,
            "plan": {"density": 0.1, "distribution": "uniform", "method": {"name": method, "interval": 100}},
        },
    }  # fmt: skip
    sparse_layers = [layer for layer in plan["layers"] if layer["kind"] == "sparse"]
    tokens_per_step = 16 * 256
    for entry in about:
        twin, spent = entry["name"], 0.0
        floor_, pace = floor.get(twin, 2.0), step_s.get(twin, 0.05)
        explored = {layer["name"]: layer["density"] for layer in sparse_layers}
        every_eval, every_log = max(1, steps // 16), max(1, steps // 250)
        rewire_s = 0.0
        for step in range(steps + 1):
            spent += pace * rng.uniform(0.93, 1.09) if step else 0.0
            nan = step >= nan_from.get(twin, steps + 1)
            bits = (
                math.nan
                if nan
                else floor_ + 1.35 * math.exp(-step / 260) + 4.6 * math.exp(-step / 28) + 0.55 / (1 + step / 400)
            )
            flops = 6 * entry["nonzeros"] * tokens_per_step * step
            if step % every_log == 0 and step:
                noisy = bits + rng.gauss(0, 0.05)
                yield {
                    "kind": "train", "twin": twin, "step": step, "loss": noisy * math.log(2), "bits_per_byte": noisy,
                    "lr": 3e-3, "grad_norm": 0.7, "tokens": tokens_per_step * step, "train_s": spent,
                    "tokens_per_s": tokens_per_step * step / spent, "flops": flops, "churn": 0.0,
                }  # fmt: skip
                parts = {f"{part}_s": share * spent for part, share in PARTS.items()}
                yield {"kind": "time", "twin": twin, "step": step, **parts, "rewire_s": rewire_s}
            if step % every_eval == 0 or step == steps:
                yield {
                    "kind": "eval", "twin": twin, "step": step, "train_s": spent, "flops": flops,
                    "loss": (bits + 0.03) * math.log(2), "bits_per_byte": bits + 0.03,
                }  # fmt: skip
            if twin.startswith("dense") or method == "static":
                continue
            for place, layer in enumerate(sparse_layers):
                if step < 100 or step > 0.75 * steps or (step - place * 100 // len(sparse_layers)) % 100:
                    continue
                churn = 0.15 * (1 + math.cos(math.pi * step / (0.75 * steps)))
                units, cells = layer["units"], math.prod(layer["shape"])
                explored[layer["name"]] += (
                    (1 - explored[layer["name"]]) * churn * layer["density"] * rng.uniform(0.4, 0.9)
                )
                spent, rewire_s = spent + 0.004, rewire_s + 0.004
                yield {
                    "kind": "rewire", "twin": twin, "step": step, "layer": layer["name"], "num_units": units,
                    "changed": round(units * churn), "churn": churn, "exploration": min(1.0, explored[layer["name"]]),
                    "newborn_survival": None if step < 200 else min(1, 0.35 + 0.4 * step / steps + rng.gauss(0, 0.04)),
                    "empty_rows": step // 100 if empties else 0, "empty_cols": cells // 10**6, "seconds": 0.004,
                    "grown_by": method,
                }  # fmt: skip
        yield {"kind": "end", "twin": twin, "step": steps, "reason": "steps"}


SAMPLE = '''def read_header(self, name, default=None):
    """Return the value of the first header called *name*, or *default*.

    If the headers are not parsed yet, this raises a ValueError that names the
    line in which the first error was found.
    """
    for key, value in self._headers:
        if key.lower() == name.lower():
            return value & self.mask if value < 0 else value
    return default
'''
