"""The table of `rarefy compare`, and the lines below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.report.comparison import cells, columns, disturbed, legend

WIDE, WIDEST = 140, 1000
"""Columns of text that a pipe gets: at least, and at most, where a table needs them."""


def show(data: Mapping[str, Any], console: Console) -> None:
    """The table of a comparison, what went wrong, and what the columns mean."""
    show_table(data, columns(data), [cells(data, row) for row in data["table"]["rows"]], legend(data), console)


def show_table(
    data: Mapping[str, Any],
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    legend: Sequence[str],
    console: Console,
) -> None:
    """A table with lines below it.

    Args:
        data: a comparison or a race.
        columns: heads, with a second line each.
        rows: cells, the label first.
        legend: what the columns mean.
    """
    drawn = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, (name, under) in enumerate(columns):
        drawn.add_column(f"{name}\n{under}" if under else name, justify="right" if at else "left", no_wrap=True)
    for label, *rest in rows:
        drawn.add_row(Text(label, style="bold"), *(Text(cell) for cell in rest))
    if not console.is_terminal:  # whoever reads a file can scroll
        needed = console.measure(drawn, options=console.options.update(max_width=WIDEST)).maximum
        console.width = min(WIDEST, max(console.width, WIDE, needed))
    console.print(drawn)
    for row in data["table"]["rows"]:
        for message in row["messages"]:
            console.print(Text(f"{row['label']}, {message}", style="red"), soft_wrap=True)
        if row["warnings"]:
            text = f"{row['label']}: {row['warnings']} warnings of the guard rails, in its records"
            console.print(Text(text, style="yellow"), soft_wrap=True)
    if line := disturbed(data):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for line in legend:
        console.print(Text(line, style="dim"), soft_wrap=True)
