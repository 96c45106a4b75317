"""An explanation's rows and totals as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.plan.precisions import INT8_TRAINING

Row = Mapping[str, Any]

TIE = 0.05
"""Times and bytes so close to each other decide nothing."""


def layers_table(rows: Sequence[Row], totals: Row) -> str:
    """A line a layer: structure, density, bytes, FLOPs, milliseconds; the last line sums them."""
    head = ["layer", "shape", "block", "density", "nnz", "bytes", "of dense", "FLOPs/token", "of dense"]
    head += ["sparse ms", "dense ms", "speed", "times"]
    total = {**totals, "shape": None, "kind": "sparse", "name": "all", "sparse_ms": totals["planned_ms"]}
    lines = [*map(_layer, rows), _layer({**total, "block": None, "times": None})]
    if any(row["rank"] for row in rows):  # a column that few plans need
        for line, cell in zip([head, *lines], ["rank", *(str(row["rank"] or "") for row in rows), ""], strict=True):
            line.insert(3, cell)
    return columns(head, lines[:-1], lines[-1])


def _layer(row: Row) -> list[str]:
    return [
        row["name"],
        "" if row["shape"] is None else _by(row["shape"]),
        _by(row["block"]) if row["kind"] == "sparse" and row["block"] else "",
        f"{row['density']:.4f}" if row["kind"] == "sparse" else "dense",
        f"{row['nnz']:,}",
        f"{row['bytes']:,}",
        f"{row['bytes'] / row['dense_bytes']:.3f}" if row["dense_bytes"] else "-",
        f"{row['flops']:,}",
        f"{row['flops'] / row['dense_flops']:.3f}" if row["dense_flops"] else "-",
        _ms(row["sparse_ms"]),
        _ms(row["dense_ms"]),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        row["times"] or "",
    ]


def precisions_table(rows: Sequence[Row], totals: Row) -> str:
    """A line a layer: milliseconds of a step sparse and dense in each precision, and which option is least by what."""
    timed = [row for row in rows if row["times"]]
    names = [option["name"] for option in totals["options"] if option["ms"] is not None]
    head = ["ms of a step", *names, "fastest", "fewest bytes", "fewest in training"]
    return columns(head, [_options(row, names) for row in timed], _options({**totals, "name": "all"}, names))


def _options(row: Row, names: Sequence[str]) -> list[str]:
    times = {option["name"]: option["ms"] for option in row["options"]}
    best = row["best"]
    return [
        row["name"],
        *(_ms(times.get(name)) for name in names),
        *(best[key] or "-" for key in ("time", "bytes", "training_bytes")),
    ]


def verdict(totals: Row) -> str:
    """In words: what wins by time and by bytes, and by how much, over the whole network."""
    found = {option["name"]: option for option in totals["options"]}
    lines = []
    for key, label, show in (
        ("time", "by time", lambda option: f"{option['ms']:.1f} ms"),
        ("bytes", "by bytes of weights and indices", lambda option: _mib(option["bytes"])),
        ("training_bytes", "by bytes in training with Adam", lambda option: _mib(option["training_bytes"])),
    ):
        field = "ms" if key == "time" else key
        winner = totals["best"][key]
        if winner is None:
            continue
        loser = "dense" if winner.startswith("sparse") else "sparse"
        others = [option for option in found.values() if option["storage"] == loser and option[field] is not None]
        line = f"{label} {winner} wins: {show(found[winner])}"
        if others:
            rival = min(others, key=lambda option: option[field])
            line += f", against {show(rival)} for {rival['name']}, the best {loser} one"
            if rival[field] < found[winner][field] * (1 + TIE):
                line += ": nearly a tie"
        lines.append(line)
    return "\n".join([*lines, INT8_TRAINING])


def columns(head: Sequence[str], lines: Sequence[Sequence[str]], last: Sequence[str] | None = None) -> str:
    """Aligned columns, the first to the left; `last` stands under a rule."""
    table = [head, *lines, *([] if last is None else [last])]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:]] if last is None else [text[0], rule, *text[1:-1], rule, text[-1]])


def _by(sides: Sequence[int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(value: int) -> str:
    return f"{value / (1 << 20):.2f} MiB"
