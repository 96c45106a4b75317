"""What is said of a choice: the two networks beside each other, who should win, what to doubt, and what to run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rarefy.foresight.choice import Candidate, Choice
from rarefy.foresight.law import Law, block_name
from rarefy.foresight.shape import Shape
from rarefy.recipes.text.field import DENSE_RATES
from rarefy.report import numbers as say

BITS = 1 / math.log(2)
"""Bits a nat."""

NAMES = {
    "nonzeros": ("parameters", say.count),
    "tokens": ("bytes trained on", say.count),
    "density": ("density", "{:g}".format),
    "layers": ("layers", "{:g}".format),
    "attention": ("attention over width", "{:.2g}".format),
    "tokens_per_step": ("bytes a step", "{:g}".format),
}
"""What the law calls something -> what people call it, and how they write it."""

DEFAULTS = {"heads": 4, "context": 256, "batch": 8}
"""Of `rarefy race` and `rarefy train text`: not said in commands."""


def table(choice: Choice) -> str:
    """Dense and sparse beside each other; a side that is missing is left out."""
    rows: list[tuple[str, Callable[[Candidate], str]]] = [
        ("bits per byte", lambda one: f"{one.loss * BITS:.3f} ± {one.sigma * BITS:.3f}"),
        ("width", lambda one: str(one.shape.width)),
        ("layers", lambda one: str(one.shape.layers)),
        ("attention", lambda one: str(one.shape.attended)),
        ("density", lambda one: "dense" if one.shape.dense else f"{one.shape.density:g}"),
        ("block", lambda one: "" if one.shape.dense else block_name(one.shape.block)),
        ("precision", lambda one: one.shape.precision),
        ("parameters", lambda one: say.count(one.shape.nonzeros)),
        ("steps", lambda one: f"{one.steps:,} of {one.shape.tokens:,} bytes"),
        ("bytes trained on", lambda one: say.count(one.tokens)),
        ("a step", lambda one: f"{one.step_ms:,.1f} ms"),
        ("memory", lambda one: say.nbytes(one.memory.peak)),
    ]
    sides = [(name, one) for name, one in (("dense", choice.dense), ("sparse", choice.sparse)) if one is not None]
    lines = [["foreseen", *(f"best {name}" for name, _ in sides)]]
    lines += [[title, *(cell(one) for _, one in sides)] for title, cell in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def sentence(choice: Choice) -> str:
    """Who should win, and by how much."""
    if choice.difference is None or choice.difference_sigma is None:
        missing = "dense" if choice.dense is None else "sparse"
        if choice.dense is None and choice.sparse is None:
            return "Nothing to choose: no network of the grid fits."
        return f"No verdict: no {missing} network of the grid fits."
    by, sigma = abs(choice.difference) * BITS, choice.difference_sigma * BITS
    if choice.winner == "neither":
        ahead = "sparse" if choice.difference < 0 else "dense"
        return f"Too close to call: {ahead} is ahead by {by:.3f} bits per byte, and a race may differ by ± {sigma:.3f}."
    return f"{choice.winner.capitalize()} should win, by {by:.3f} ± {sigma:.3f} bits per byte."


def doubts(choice: Choice, law: Law, *, data_bytes: int) -> list[str]:
    """What the figures do not know."""
    found = []
    sides = [(name, one) for name, one in (("dense", choice.dense), ("sparse", choice.sparse)) if one is not None]
    for name, one in sides:
        values = {"nonzeros": one.shape.nonzeros, "tokens": one.tokens, "density": one.shape.density}
        values |= {"layers": one.shape.layers, "attention": one.shape.attended / one.shape.width}
        values |= {"tokens_per_step": one.shape.tokens}
        beyond = []
        for key in one.outside:
            title, written = NAMES[key]
            low, high = (written(end) for end in law.covers[key])
            beyond.append(f"{title} {written(values[key])}, and its runs had {low} to {high}")
        if beyond:
            said = "; ".join(beyond)
            found.append(f"the best {name} one lies outside of what the scaling law knows ({said}): ± may be too small")
    most = max((one.tokens for _, one in sides), default=0)
    if most > data_bytes:
        found.append(
            f"the text has {say.count(data_bytes)} bytes, so the longest run would read it {most / data_bytes:.1f} "
            "times: the law counts a byte that is read again like a new one, so losses will be higher than foreseen; "
            "repetition hurts sparse networks later than dense ones (Wu et al. 2026), so dense more than sparse"
        )
    if choice.too_large:
        wished = choice.wish.memory_bytes or 0
        found.append(f"{choice.too_large:,} of {choice.considered:,} networks need more than {say.nbytes(wished)}")
    return found


def usual_method(choice: Choice) -> str:
    """Of the sparse network, unless the user says: the law's runs are of SET and of fixed patterns.

    SET gains a little by moving single units, and loses by moving blocks of several columns (docs/log.md).
    """
    return "static" if choice.sparse is not None and choice.sparse.shape.block[1] > 1 else "set"


def race_command(choice: Choice, *, data: str | None, budget: str, method: str) -> str | None:
    """The race that checks it, the dense one at both rates of a race's ladder, so that it is tuned; None without both
    sides.
    """
    if choice.dense is None or choice.sparse is None:
        return None
    dense, sparse = choice.dense.shape, choice.sparse.shape
    contenders = [f"dense:{_sizes_said(dense)},dense_lr={rate:g}" for rate in DENSE_RATES]
    if dense.batch != sparse.batch:
        contenders = [f"{text},batch={dense.batch}" for text in contenders]
    contenders.append(f"{method}:{_sizes_said(sparse)},density={sparse.density:g}{_block_said(sparse.block)}")
    shared = [*_data(data), "--budget", budget, *_shared(choice.sparse)]
    return shlex.join(["rarefy", "race", *shared, "--contenders", *contenders])


def train_command(choice: Choice, *, data: str | None, method: str) -> str | None:
    """The run of the best sparse network; None without one."""
    if choice.sparse is None:
        return None
    shape = choice.sparse.shape
    words = ["--width", shape.width, "--layers", shape.layers, "--density", f"{shape.density:g}", "--method", method]
    if shape.attention is not None:
        words += ["--attention", shape.attention]
    if shape.block != (1, 1):
        words += ["--block", *(shape.block[:1] if shape.block[0] == shape.block[1] else shape.block)]
    if shape.precision == "bf16":
        words += ["--precision", "bf16"]
    words += ["--steps", choice.sparse.steps, "--no-twin", "--no-measure"]
    return shlex.join(["rarefy", "train", "text", *_data(data), *_shared(choice.sparse), *map(str, words)])


def plain(one: Candidate | None) -> dict[str, Any] | None:
    """A candidate as JSON has it."""
    if one is None:
        return None
    shape = one.shape
    return {
        "bits_per_byte": one.loss * BITS, "sigma": one.sigma * BITS, **asdict(shape), "block": list(shape.block),
        "parameters": shape.nonzeros, "steps": one.steps, "tokens": one.tokens, "step_ms": one.step_ms,
        "memory_bytes": {**asdict(one.memory), "total": one.memory.total, "peak": one.memory.peak},
        "outside": list(one.outside),
    }  # fmt: skip


def _data(data: str | None) -> list[str]:
    return [] if data is None else ["--data", data]


def _shared(one: Candidate) -> list[str]:
    """Options that all contenders share, where they are not the default."""
    said = [(name, getattr(one.shape, name)) for name, usual in DEFAULTS.items() if getattr(one.shape, name) != usual]
    return [word for name, value in said for word in (f"--{name}", str(value))]


def _sizes_said(shape: Shape) -> str:
    attention = "" if shape.attention is None else f"attention={shape.attention},"
    return f"width={shape.width},{attention}layers={shape.layers}"


def _block_said(block: tuple[int, int]) -> str:
    if block == (1, 1):
        return ""
    return f",block={block[0]}" if block[0] == block[1] else f",block=[{block[0]}, {block[1]}]"
