"""The tables of `rarefy bench`, in 100 columns, or in 80 with less in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.bench import Crossing, Results, Row, Spread
from rarefy.bench.contender import FUSED_NORMS
from rarefy.bench.results import DENSE

WIDE = 100
"""Columns of text from which a table is shown whole; also what a pipe gets."""

Cell = Callable[[Row], Text | str]


def show(results: Results, console: Console) -> None:
    """The machine, a table of layers and one of GPTs, break-even densities, and what to know about the figures."""
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    about = results.machine
    on_gpu = results.settings.get("device", "cpu") != "cpu"
    if on_gpu:
        console.print(
            f"{about['gpu']}, torch {about['torch']}, rarefy {about['rarefy']}, {about['date']}",
            highlight=False,
            soft_wrap=True,
        )
    else:
        _say_cpu(about, console)
    console.print(_ceilings(results), soft_wrap=True)
    for kind in ("layer", "gpt", "conv", "cnn"):
        rows = [row for row in results.rows if row.kind == kind]
        if rows:
            console.print(table(rows, "triton" if on_gpu else about["isa"], wide=console.width >= WIDE))
    if results.break_evens:
        console.print(break_evens(results))
    for line in [*_legend(results), *results.notes]:
        console.print(Text(line, style="dim"), soft_wrap=True)


def _say_cpu(about: dict[str, Any], console: Console) -> None:
    console.print(
        f"{about['cpu']}, {about['threads']} threads, kernels {about['isa']}, dense {about['dense_isa']}"
        f"{' + bf16' if about['dense_bf16'] else ''}, torch {about['torch']}, rarefy {about['rarefy']}, "
        f"{about['date']}",
        highlight=False,
        soft_wrap=True,
    )


def table(rows: list[Row], usual: str, *, wide: bool = True) -> Table:
    """Rows of one kind, under a line for each layer and token count, or each GPT.

    Args:
        usual: the kernels that need no mention.
        wide: all columns; otherwise those that 80 columns of text have room for.
    """
    columns = _columns(rows[0].kind, usual, wide)
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for at, name in enumerate(columns):
        drawn.add_column(name, justify="right" if at else "left", no_wrap=True)
    for kind, shape, tokens, what in dict.fromkeys((row.kind, row.shape, row.tokens, row.what) for row in rows):
        size = "x".join(map(str, shape))
        drawn.add_row(Text(what or (f"GPT {size}" if kind == "gpt" else f"{size}, {tokens} tok."), style="bold"))
        for row in (row for row in rows if (row.shape, row.tokens, row.what) == (shape, tokens, what)):
            drawn.add_row(*(cell(row) for cell in columns.values()))
    return drawn


def _columns(kind: str, usual: str, wide: bool) -> dict[str, Cell]:
    time: dict[str, Cell] = {"fwd": lambda row: _ms(row.forward_ms)}
    if kind == "conv":
        time |= {"bwd": lambda row: _ms(row.backward_ms)}
    elif kind in ("gpt", "cnn"):
        time |= {"bwd": lambda row: _ms(row.backward_ms), "opt": lambda row: _ms(row.optimizer_ms)}
    else:
        time |= {"dX": lambda row: _ms(row.dx_ms), "dW": lambda row: _ms(row.dw_ms)}
    columns: dict[str, Cell] = {
        "who": lambda row: _who(row, usual),
        "dens.": lambda row: "" if row.contender == DENSE else f"{row.density:.3f}".rstrip("0").rstrip("."),
        **time,
        "total": lambda row: _ms(row.total_ms),
        "/fp32": lambda row: _speed(row.speedup_fp32, row),
        "/best": lambda row: _speed(row.speedup, row),
        "quartiles": lambda row: "-" if row.speedup is None else f"{row.speedup.q1:.2f}-{row.speedup.q3:.2f}",
    }
    if kind in ("layer", "conv"):
        columns["eff."] = lambda row: "-" if row.efficiency is None else f"{row.efficiency:.2f}"
    columns["ceil."] = lambda row: "-" if row.share is None else f"{row.share:.0%}"
    if kind == "layer" and wide:
        columns["growth"] = lambda row: "-" if row.growth_ratio is None else f"{row.growth_ratio.median:.2f}x"
    if not wide:
        del columns["quartiles"]
    return columns


def _who(row: Row, usual: str) -> str:
    """Name, block and dtype; and the kernels where they are not the usual ones."""
    if row.contender == DENSE:
        more = " fused norms" if row.kernels == FUSED_NORMS else ""
        return f" dense {row.dtype}" + (" compiled" if row.compiled else "") + more
    if row.contender != "rarefy":
        return f" {row.contender}"
    return f" rarefy {row.block[0]}x{row.block[1]} {row.dtype}" + ("" if row.kernels == usual else f" {row.kernels}")


def _speed(speed: Spread | None, row: Row) -> Text | str:
    if speed is None:
        return "-"
    if row.contender == DENSE:
        style = ""
    else:
        style = "green" if speed.q1 > 1 else "red" if speed.q3 < 1 else "yellow"
    return Text(f"{speed.median:.2f}" + ("*" if row.forward_only else "x"), style=style)


def _ms(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f}" if spread.median < 100 else f"{spread.median:.0f}"


def break_evens(results: Results) -> Table:
    """Where each layer stops winning, against dense fp32 and against the fastest dense."""
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("break-even density of", "block", "dtype", "against dense fp32", "against the fastest"):
        drawn.add_column(name, no_wrap=True)
    for found in results.break_evens:
        size = "x".join(map(str, found.shape))
        drawn.add_row(
            f"{size}, {found.tokens} tok.",
            "x".join(map(str, found.block)),
            found.dtype,
            _crossing(found.against_fp32),
            _crossing(found.against_fastest),
        )
    return drawn


def _crossing(found: Crossing) -> str:
    """The estimate between two densities, or all that was measured."""
    if found.density is not None:
        return f"~{found.density:.2g} ({found.faster_at:.2g} to {found.slower_at:.2g})"
    if found.faster_at is not None:
        return f"faster up to {found.faster_at:.2g}"
    return "-" if found.slower_at is None else f"slower from {found.slower_at:.2g}"


def _ceilings(results: Results) -> Text:
    """What the probe found, and whether it moved."""
    units = {"read": "GB/s", "copy": "GB/s"}
    parts = []
    for name, (first, last) in results.check.readings().items():
        unit = "ms" if name == "dense reference" else units.get(name.rpartition(" ")[2], "GFLOP/s")
        parts.append(
            f"{name} {_three(first)} {unit}" + ("" if abs(last / first - 1) < 0.05 else f", then {_three(last)}")
        )
    return Text("Measured: " + "; ".join(parts) + f". {results.seconds:.0f} s in all.", style="dim")


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _legend(results: Results) -> list[str]:
    found = {row.kind for row in results.rows}
    lines = []
    if "layer" in found:
        lines.append(
            "Milliseconds, medians of interleaved rounds. total: forward and backward through autograd, packing "
            "included; dX and dW: called alone; growth: the best absent weights by gradient, against the dense dW, "
            "at one density."
        )
    if found & {"conv", "cnn"}:
        lines.append(
            "conv, cnn: channels_last; a conv without bias, forward and backward; a cnn's whole training step with "
            "SGD, its first convolution and head dense; fused norms: with our batch norms, as the sparse one."
        )
    if "gpt" in found:
        lines.append(
            f"GPT: a whole training step of {results.settings['step_tokens']} tokens, context "
            f"{results.settings['context']}; opt: clipping and optimizer; dens.: of the sparse layers."
        )
    lines.append(
        "/fp32, /best: time of dense fp32, and of the fastest dense in the same rounds, over this one, round by round; "
        "then the quartiles of the latter; *: of the forward alone. eff.: efficiency = dense time x density / sparse "
        "time, against the fastest. ceil.: useful FLOPs as a share of what the probe reached."
    )
    return lines
