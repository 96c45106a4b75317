"""Puts a report together and writes it whole or not at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rarefy.files import atomic_write
from rarefy.report import numbers as say
from rarefy.report.compare import (
    SAME_PACE,
    Contender,
    contenders,
    pair_of,
    reading,
    steps_sentence,
    verdict,
)
from rarefy.report.figures import all_figures
from rarefy.report.image_figures import filters, image_figures, mistakes
from rarefy.report.page import flat, render_page
from rarefy.report.plan_table import plan_table
from rarefy.report.read import Run, number, numbers, read_run
from rarefy.training.subject import BITS_PER_BYTE, TEXT, Metric

UNEVEN = 1.15
"""Mean over median step time from which the difference is pointed out: the headline has the median."""

SHOWN_WARNINGS = 12
"""More are folded."""


def build_report(run_dir: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the report of a run, or of several runs over each other, as one offline HTML file.

    Args:
        run_dir: a run folder, or several to compare. Only its metrics.jsonl has to exist: a run that is still going,
            was killed, or lacks files gives a report that says what is missing.
        out: the file to write; `report.html` in the run folder by default, to be named for several runs. It appears
            whole or not at all; one that was there is replaced.
    Returns:
        the path written.
    Raises:
        ValueError: a folder is no run folder, no folder is given, several without `out`, runs of text and of images
            together, or `out` is in no folder.
        OSError: the file cannot be written, on a full disk for example; what was there before is untouched.
    """
    folders = [Path(run_dir)] if isinstance(run_dir, Path | str) else [Path(folder) for folder in run_dir]
    if not folders:
        raise ValueError(
            "a report needs at least one run folder, got none; give the folder of a run, such as runs/<id>."
        )
    if out is None and len(folders) > 1:
        raise ValueError(
            f"a report of {len(folders)} runs belongs to none of their folders; name its file: out='compare.html'."
        )
    runs = [read_run(folder) for folder in folders]
    other = next((run for run in runs if run.subject is not runs[0].subject), None)
    if other is not None:
        one, two = runs[0].subject, other.subject
        raise ValueError(
            f"{runs[0].path} is a run of {one.name} and {other.path} one of {two.name}: {one.metric.title} and "
            f"{two.metric.title} do not compare; give runs of one kind"
        )
    path = folders[0] / "report.html" if out is None else Path(out)
    if not path.parent.is_dir():
        raise ValueError(
            f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; create it or name another."
        )
    atomic_write(path, render(runs).encode())
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    field = contenders(runs)
    return render_page(
        "template.html.j2",
        [*all_figures(field), *image_figures(field)],
        subject=runs[0].subject,
        mistakes=mistakes(field),
        filters=filters(field),
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        field=field,
        verdict=verdict(field),
        steps_sentence=steps_sentence(field),
        notes=_notes(runs, field),
        cards=_cards(field),
        table=_table(field),
        no_empties=_no_empties(field),
        warnings=_warnings(field),
        shown_warnings=SHOWN_WARNINGS,
        frozen=_frozen(field),
        plans=[plan_table(run) for run in runs if run.plan is not None and run.plan["layers"]],
        provenance=[_provenance(run) for run in runs],
    )


def _notes(runs: Sequence[Run], field: Sequence[Contender]) -> list[str]:
    """What is missing, run by run, and what makes runs hard to compare."""
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    notes[:0] = [
        f"Diverged: {c.label}, its loss is not a number at step {c.diverged_at:,}." for c in field if c.diverged_at
    ]
    for c in field:
        if c.mean_step_s > UNEVEN * c.step_s:
            form = say.step_times((c.step_s, c.mean_step_s))
            notes.append(
                f"Uneven steps: {c.label} took {form(c.step_s)} in the median and {form(c.mean_step_s)} on average; "
                "rewires, or something else on this machine, cost the difference."
            )
    machines = {tuple(flat(run.machine)) for run in runs if run.machine}
    if len(machines) > 1:
        notes.insert(0, "These runs come from different machines, threads or versions: their times do not compare.")
    data = dict(run.data for run in runs if run.data)
    if len(data) > 1:
        notes.insert(0, f"These runs saw different data ({', '.join(data.values())}): their losses do not compare.")
    return notes


def _cards(field: Sequence[Contender]) -> list[dict[str, Any]]:
    """The four figures that a sparse network and its dense twin are judged by; each says who is better."""
    pair = pair_of(field)
    if pair is None:
        return []
    sparse, dense = pair
    cards: list[dict[str, Any]] = []

    def card(
        big: str,
        unit: str,
        what: str,
        form: Callable[[float], str],
        ours: float,
        theirs: float,
        level: bool,
        sign: int = 1,
    ) -> None:
        better = None if level else sparse if sign * ours < sign * theirs else dense
        cards.append(
            {"big": big, "unit": unit, "what": what, "ours": form(ours), "theirs": form(theirs), "better": better}
        )

    at_time = reading(field, "train_s")
    metric = sparse.metric
    ours, theirs = at_time.values.get(sparse, math.nan), at_time.values.get(dense, math.nan)
    if math.isfinite(ours - theirs):
        level = abs(ours - theirs) < metric.level
        big = "level" if level else _signed(metric, ours - theirs)
        unit = "points" if metric.percent else metric.title
        what = f"{'loss' if metric is BITS_PER_BYTE else metric.title} at equal time"
        card(big, "" if level else unit, what, metric.show, ours, theirs, level, metric.sign)
    for what, form, less, more, ours, theirs in (
        (
            "time per step",
            say.step_times((sparse.step_s, dense.step_s)),
            "faster",
            "slower",
            sparse.step_s,
            dense.step_s,
        ),
        ("training memory", say.nbytes, "less", "more", sparse.total_bytes, dense.total_bytes),
        ("nonzero parameters", say.count, "fewer", "more", sparse.nonzeros, dense.nonzeros),
    ):
        if not (ours > 0 and theirs > 0):
            continue
        factor = max(ours / theirs, theirs / ours)
        level = factor < SAME_PACE
        big = "same" if level else say.times(factor)
        card(big, "" if level else less if ours < theirs else more, what, form, ours, theirs, level)
    return cards


def _table(field: Sequence[Contender]) -> dict[str, Any]:
    """The closing table: a row per contender, the best of each column marked, and the ratio where there are two."""
    at_time, at_steps = reading(field, "train_s"), reading(field, "step")
    equal = "equal " if len(field) > 1 else ""
    when = f"at {equal}time, {say.seconds(at_time.at)}" if at_time.at is not None else f"no {equal}time"
    steps = f"at {equal}steps, {at_steps.at:,.0f}" if at_steps.at is not None else f"no {equal}steps"
    pace = say.step_times(contender.step_s for contender in field)
    subject = field[0].run.subject if field else TEXT
    metric = subject.metric
    title = metric.title.capitalize()
    columns: list[tuple[str, str, Callable[[float], str], Callable[[Contender], float], int]] = [
        (title, when, metric.show, lambda c: at_time.values.get(c, math.nan), -metric.sign),
        (title, steps, metric.show, lambda c: at_steps.values.get(c, math.nan), -metric.sign),
        ("Parameters", "as if dense", say.count, lambda c: c.parameters, 0),
        ("Nonzeros", "", say.count, lambda c: c.nonzeros, 0),
        ("Training memory", "with indices", say.nbytes, lambda c: c.total_bytes, -1),
        ("Step", "median", pace, lambda c: c.step_s, -1),
        ("Step", "mean", pace, lambda c: c.mean_step_s, -1),
        (f"{subject.item.capitalize()}s", "per second", say.count, lambda c: c.tokens_per_s, 1),
    ]  # fmt: skip
    rows: list[dict[str, Any]] = [{"contender": c, "trained": _trained(c), "cells": []} for c in field]
    for _, _, form, value, sense in columns:
        shown = [form(value(contender)) if math.isfinite(value(contender)) else say.DASH for contender in field]
        ranked = [sense * value(contender) for contender in field if math.isfinite(value(contender))]
        for row, text in zip(rows, shown, strict=True):
            mine = sense * value(row["contender"])
            best = sense != 0 and len(ranked) > 1 and mine == max(ranked) and shown.count(text) < len(field)
            row["cells"].append({"text": text, "best": best})
    pair = pair_of(field)
    ratio: list[str] = []
    if pair:
        for place, (*_, value, _) in enumerate(columns):
            ours, theirs = value(pair[0]), value(pair[1])
            if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0):
                ratio.append(say.DASH)
            else:
                ratio.append(_signed(metric, ours - theirs) if place < 2 else say.times(ours / theirs))
    return {"columns": [column[:2] for column in columns], "rows": rows, "ratio": ratio, "pair": pair}


def _signed(metric: Metric, difference: float) -> str:
    return metric.gap(difference).replace("-", "−")


def _trained(contender: Contender) -> str:
    spent = number(contender.twin.train[-1], "train_s") if contender.twin.train else math.nan
    return f"{contender.twin.last_step:,} steps" + (f" in {say.seconds(spent)}" if math.isfinite(spent) else "")


def _no_empties(field: Sequence[Contender]) -> bool:
    """Whether rewires were logged and none of them left a row or column empty."""
    counts = [n for c in field for key in ("empty_rows", "empty_cols") for n in numbers(c.twin.rewire, key)]
    return bool(counts) and not any(counts)


def _warnings(field: Sequence[Contender]) -> list[dict[str, Any]]:
    """What guards said, a record each, by contender and step."""
    return [
        {
            "contender": c,
            "step": f"{record['step']:,}",
            "guard": str(record.get("guard") or ""),
            "layer": str(record.get("layer") or ""),
            "message": str(record.get("message") or ""),
        }
        for c in field
        for record in c.twin.guard
    ]


def _frozen(field: Sequence[Contender]) -> list[str]:
    """From when on each pattern was left alone, a sentence each."""
    found = []
    for c in field:
        start, last = number(c.twin.about, "frozen_from"), c.twin.last_step
        if math.isfinite(start) and start < last:
            share = say.percent((last - start) / last)
            found.append(f"{c.label}: the pattern was frozen after step {start:,.0f}, the last {share} of its steps.")
        elif math.isfinite(start):
            found.append(f"{c.label}: the pattern is to be frozen after step {start:,.0f}, which it has not passed.")
    return found


def _provenance(run: Run) -> dict[str, Any]:
    created = run.created
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(created)
        created = f"{moment:%d %B %Y, %H:%M}".lstrip("0") + (f" {moment.tzname()}" if moment.tzinfo else "")
    return {"run": run, "created": created, "machine": flat(run.machine), "settings": flat(run.settings)}
