"""What a finished run shows: both networks in one table, a verdict that follows from it, how it ended, the report."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rarefy.files import atomic_write
from rarefy.recipes.run import Outcome
from rarefy.report import build_report
from rarefy.report import numbers as say
from rarefy.report.compare import Contender, contenders, reading, verdict
from rarefy.report.read import guard_lines, number, read_run
from rarefy.training.folder import SUMMARY


def close(outcome: Outcome, console: Console, *, report: bool) -> dict[str, Any]:
    """Print the closing table and what else there is to see, write the report, and complete summary.json.

    Returns:
        The summary: that of the run, with figures of each network and the comparison, plain data.
    """
    field = contenders([read_run(outcome.folder)])
    at_time, at_steps = reading(field, "train_s"), reading(field, "step")
    summary = {**outcome.summary, "folder": str(outcome.folder), "verdict": verdict(field).text}
    for c in field:
        summary["twins"][c.twin.name] |= {
            c.metric.key: _plain(c.curve("step")[-1][1]),
            "parameters": _plain(c.parameters),
            "nonzeros": _plain(c.nonzeros),
            "training_bytes": c.training_bytes,
            "step_s": _plain(c.mean_step_s),
            "tokens_per_s": _plain(c.tokens_per_s),
            "warnings": [dict(record) for record in c.twin.guard],
        }
    for name, found in (("at_equal_time", at_time), ("at_equal_steps", at_steps)):
        if found.at is not None and len(field) > 1:
            summary[name] = {
                "at": found.at,
                field[0].metric.key: {c.twin.name: _plain(value) for c, value in found.values.items()},
            }
    atomic_write(outcome.folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())

    console.print()
    console.print(_table(field))
    console.print(Text(verdict(field).text), soft_wrap=True)
    for note in _notes(field):
        console.print(Text(note), style="dim", soft_wrap=True)
    for c in field:
        for line in guard_lines(c.twin):
            console.print(Text(f"warning: {line}"), soft_wrap=True)
    console.print()
    console.print(Text(outcome.ending.heading), style="dim")
    console.print(Text(_printable(outcome.ending.body)), soft_wrap=True)
    console.print()
    if report:
        summary["report"] = str(build_report(outcome.folder))
        console.print(Text(f"report: {summary['report']}"), soft_wrap=True)
    console.print(Text(outcome.ending.hint), soft_wrap=True)
    return summary


def _table(field: Sequence[Contender]) -> Table:
    """A row a figure, a column a network, and their ratio or difference."""
    at_time, at_steps = reading(field, "train_s"), reading(field, "step")
    metric, item = field[0].metric, field[0].run.subject.item
    pace = say.step_times([c.mean_step_s for c in field])
    rows: list[tuple[str, Callable[[Contender], float], Callable[[float], str], bool]] = []
    if at_time.at is not None and len(field) > 1:
        label = f"{metric.title} at equal time ({say.seconds(at_time.at)})"
        rows.append((label, lambda c: at_time.values.get(c, math.nan), metric.show, True))
    if at_steps.at is not None:
        label = f"{metric.title} {'at equal steps' if len(field) > 1 else 'at the end'} ({at_steps.at:,.0f})"
        rows.append((label, lambda c: at_steps.values.get(c, math.nan), metric.show, True))
    rows += [
        ("training time", lambda c: number(c.twin.train[-1], "train_s"), say.seconds, False),
        ("time per step", lambda c: c.mean_step_s, pace, False),
        (f"{item}s per second", lambda c: c.tokens_per_s, say.count, False),
        ("parameters as if dense", lambda c: c.parameters, say.count, False),
        ("nonzeros", lambda c: c.nonzeros, say.count, False),
        ("training memory", lambda c: c.total_bytes, say.nbytes, False),
    ]
    rows += [
        (f"  {part}", _part(part), say.nbytes, False) for part in ("parameters", "gradients", "optimizer", "indices")
    ]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for c in field:
        table.add_column(c.label, justify="right")
    if len(field) == 2:
        table.add_column(f"{field[0].label} / {field[1].label}", justify="right")
    for label, value, form, difference in rows:
        values = [value(c) for c in field]
        cells = [form(v) if math.isfinite(v) else say.DASH for v in values]
        if len(values) == 2:
            known = all(map(math.isfinite, values))
            both = metric.gap(values[0] - values[1]) if difference else ""
            both = say.times(values[0] / values[1]) if values[1] and not difference else both
            cells.append(both if known else say.DASH)
        table.add_row(label, *cells)
    return table


def _part(part: str) -> Callable[[Contender], float]:
    return lambda c: c.training_bytes.get(part, math.nan)


def _notes(field: Sequence[Contender]) -> list[str]:
    """What the reader should know about the figures."""
    at_time = reading(field, "train_s")
    if len(field) < 2 or at_time.at is None:
        return []
    slowest = max(field, key=lambda c: number(c.twin.train[-1], "train_s"))
    times = [number(record, "train_s") for record in slowest.twin.train]
    reached = slowest.twin.train[max(0, bisect_right(times, at_time.at) - 1)]["step"]
    last = slowest.twin.last_step
    if reached >= 0.98 * last:
        return []
    return [
        f"At equal time {slowest.label} was at step {reached:,} of {last:,}, its learning rate not down yet: "
        f"a {slowest.label} run of that length alone would do somewhat better than the figure here."
    ]


def _printable(text: str) -> str:
    """Control characters, which a young network likes, must not reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
