"""`rarefy bench`: a table of sparse against dense on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.bench import Results, Row, Spread
from rarefy.bench import run as run_bench
from rarefy.bench.results import DISTURBED
from rarefy.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time layers sparse and dense on this machine: forward and both gradients, fp32, interleaved in one process."""

    shapes: tuple[str, ...] = ("512x512", "1024x1024", "4096x1024", "1024x4096")
    """Layers, as OUTxIN."""

    densities: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Shares of the weights that exist, in (0, 1]."""

    blocks: tuple[int | str, ...] = (1, 4)
    """Unit shapes: 1 is unstructured, 4 is 4x4, 4x1 is four outputs of one input."""

    tokens: int = 2048
    """Rows of input."""

    threads: int | None = None
    """CPU threads. Default: what torch takes."""

    rounds: int = 25
    """The most rounds; a slow machine gets fewer, at least three."""

    isa: str = "auto"
    """Instruction set of the kernels (avx512, avx2, neon, portable), or tiled or reference: plain torch."""

    seconds: float = 30.0
    """About how long it may take; longer where three rounds do not fit."""

    peers: bool = True
    """Also time torch's CSR layout and, if installed, SparseLab."""

    json: bool = False
    """Print JSON, and nothing else, to stdout."""

    out: Path | None = None
    """Also write the JSON to this file."""


def run(settings: Bench) -> None:
    """Measure, then print a table or JSON."""
    shapes = [sides(text, "shapes") for text in settings.shapes]
    blocks = [sides(text, "blocks") for text in settings.blocks]
    console = Console(stderr=True)
    with console.status("") as status:
        results = run_bench(
            shapes=list(dict.fromkeys(shapes)),
            densities=list(dict.fromkeys(settings.densities)),
            blocks=list(dict.fromkeys(blocks)),
            tokens=settings.tokens,
            threads=settings.threads,
            rounds=settings.rounds,
            isa=settings.isa,
            seconds=settings.seconds,
            with_peers=settings.peers,
            progress=lambda text: status.update(f"timing {text}"),
        )
    text = json.dumps(results.to_json(), indent=1, allow_nan=False) + "\n"
    if settings.out is not None:
        atomic_write(settings.out, text.encode())
    if settings.json:
        sys.stdout.write(text)
    else:
        show(results, Console())
    if results.check.disturbed:
        console.print(Text(_disturbed(results), style="yellow"), soft_wrap=True)


def sides(text: int | str, option: str) -> tuple[int, int]:
    """Text such as "4096x1024" to (4096, 1024); for a block also 4, a square.

    Raises:
        ValueError: it says something else.
    """
    parts = str(text).lower().split("x")
    square = option == "blocks" and len(parts) == 1
    parts = parts * 2 if square else parts
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        wanted = "4 or 4x1 (outputs x inputs)" if option == "blocks" else "4096x1024 (out_features x in_features)"
        raise ValueError(f"{option}: {text!r} is none; write them like {wanted}")
    return int(parts[0]), int(parts[1])


def show(results: Results, console: Console) -> None:
    """The machine, a table of all rows, break-even densities, and what to know about the figures."""
    about, settings = results.machine, results.settings
    console.print(
        f"{about['cpu']}, {about['threads']} threads, kernels {about['isa']}, torch {about['torch']}, "
        f"rarefy {about['rarefy']}, {about['date']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(results))
    console.print(_break_evens(results))
    lines = [
        f"Milliseconds, medians of interleaved rounds; {settings['tokens']} tokens, fp32. total: forward and backward "
        "through autograd, packing included; dX and dW: called alone.",
        "speed: dense over sparse time, round by round, then its quartiles; *: of the forward alone. "
        "eff.: efficiency = dense time x density / sparse time. growth: the best absent weights by gradient, against "
        "the dense dW. Growth and torch CSR are timed at one density: they are long.",
        f"Dense reference {results.check.first_ms:.2f} ms before, {results.check.last_ms:.2f} ms after; "
        f"{results.seconds:.0f} s in all.",
    ]
    for line in [*lines, *results.notes]:
        console.print(Text(line, style="dim"), soft_wrap=True)


def _table(results: Results) -> Table:
    """Narrow enough for 80 columns: a layer's dense row heads its sparse ones."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer, who", no_wrap=True)
    for name in ("dens.", "fwd", "dX", "dW", "total", "speed", "quartiles", "eff.", "growth"):
        table.add_column(name, justify="right", no_wrap=True)
    for shape in dict.fromkeys(row.shape for row in results.rows):
        for row in (row for row in results.rows if row.shape == shape):
            is_dense = row.contender == "dense"
            table.add_row(*_cells(row, results.machine["isa"]), style="bold" if is_dense else None)
    return table


def _cells(row: Row, usual: str) -> list[Text | str]:
    speed = row.speedup
    style = "" if speed is None else "green" if speed.q1 > 1 else "red" if speed.q3 < 1 else "yellow"
    return [
        _who(row, usual),
        f"{row.density:.3f}".rstrip("0").rstrip("."),
        _ms(row.forward_ms),
        _ms(row.dx_ms),
        _ms(row.dw_ms),
        _ms(row.total_ms),
        "-" if speed is None else Text(f"{speed.median:.2f}x" + ("*" if row.forward_only else " "), style=style),
        "-" if speed is None else f"{speed.q1:.2f}-{speed.q3:.2f}",
        "-" if row.efficiency is None else f"{row.efficiency:.2f}",
        "-" if row.growth_ratio is None else f"{row.growth_ratio.median:.2f}x",
    ]


def _who(row: Row, usual: str) -> str:
    """The layer in front of its dense row; behind ours the block, and the kernels where they are not the usual ones."""
    if row.contender == "dense":
        return f"{row.shape[0]}x{row.shape[1]} dense"
    if row.contender != "rarefy":
        return row.contender
    return f"rarefy {row.block[0]}x{row.block[1]}" + ("" if row.kernels == usual else f" {row.kernels}")


def _ms(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f}" if spread.median < 100 else f"{spread.median:.0f}"


def _break_evens(results: Results) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("layer")
    table.add_column("block", justify="right")
    table.add_column("break-even density", justify="right")
    table.add_column("as measured")
    for found in results.break_evens:
        low, high = found.faster_at, found.slower_at
        if low is None:
            said = f"slower at all, from {high:.3g}"
        elif high is None:
            said = f"faster at all, up to {low:.3g}"
        else:
            said = f"interpolated: {low:.3g} faster, {high:.3g} slower"
        estimate = "-" if found.density is None else f"~{found.density:.2g}"
        table.add_row("x".join(map(str, found.shape)), "x".join(map(str, found.block)), estimate, said)
    return table


def _disturbed(results: Results) -> str:
    check = results.check
    return (
        f"rarefy: warning: the dense reference took {check.first_ms:.2f} ms before and {check.last_ms:.2f} ms after, "
        f"{check.moved:.0%} apart (more than {DISTURBED:.0%}): something else used the machine; repeat on an idle one"
    )
