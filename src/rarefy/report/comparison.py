"""The page and the cells of a comparison: `rarefy compare`, from its table and records as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rarefy.files import atomic_write
from rarefy.report import numbers as say
from rarefy.report.comparison_figures import comparison_figures
from rarefy.report.page import flat, render_page

Data = Mapping[str, Any]

PAGE, DATA = "compare.html", "comparison.json"

DISTURBED = 0.15
"""Training time off the budget, or its spread over seeds, by more than this share is pointed out."""


def is_comparison(folder: Path) -> bool:
    """Whether `rarefy compare` has left its figures there."""
    return (folder / DATA).is_file()


def rebuild_comparison(folder: Path, out: Path | None = None) -> Path:
    """The page again, from the files of a comparison; see `build_comparison`.

    Raises:
        ValueError: one of them is missing or damaged.
    """
    path = folder / DATA
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        records = {}
        for run in data["runs"]:
            path = folder / "runs" / Path(run["file"]).name
            record = json.loads(path.read_text(encoding="utf-8"))
            records[record["digest"]] = record
        return build_comparison(folder, data, records, out)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, which {folder / DATA} names: make it again with rarefy compare") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): make it again with rarefy compare") from error


def build_comparison(folder: Path, data: Data, records: Mapping[str, Data], out: Path | None = None) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
        data: what comparison.json says.
        records: digest -> record.
        out: the file; None: compare.html in the folder.
    """
    path = folder / PAGE if out is None else out
    atomic_write(path, comparison_page(folder.name, data, records).encode())
    return path


def comparison_page(name: str, data: Data, records: Mapping[str, Data]) -> str:
    """The page as text: a sentence, curves with their spread, every seed's result, the table, what was asked."""
    rows = data["table"]["rows"]
    machine = data["machines"][0] if data["machines"] else {}
    return render_page(
        "comparison.html.j2",
        comparison_figures(data, records),
        title=name,
        about=f"{name} · {data['task']} · {data['data']['name']} · {budget(data)} · {seeds_in_words(data)}",
        headline=headline(data),
        notes=notes(data),
        columns=columns(data),
        rows=[
            {"colour": at, "cells": cells(data, row), "best": row["label"] in best(data)} for at, row in enumerate(rows)
        ],
        legend=legend(data),
        machine=flat(machine),
        settings=flat(data["settings"]),
        made="Made by rarefy compare.",
    )


def budget(data: Data) -> str:
    """What was equal, in words."""
    by, amount = data["budget"]["by"], data["budget"]["amount"]
    if by == "steps":
        return f"{amount:,.0f} steps each"
    return f"{say.seconds(60 * amount)} of training each" if by == "minutes" else f"{say.count(amount)} FLOPs each"


def seeds_in_words(data: Data) -> str:
    return f"{len(data['seeds'])} seed{'s' if len(data['seeds']) > 1 else ''}"


# -- figures in words -----------------------------------------------------------------------------------------------


def figure(data: Data, value: float | None, *, signed: bool = False) -> str:
    """A value of the metric: 2.314 bits, 89.32%."""
    if value is None or not math.isfinite(value):
        return say.DASH
    scaled, digits = (100 * value, 2) if data["metric"]["percent"] else (value, 3)
    return f"{scaled:{'+' if signed else ''}.{digits}f}"


def spread(data: Data, found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Mean and spread of the metric."""
    if found is None:
        return say.DASH
    mean = figure(data, found["mean"], signed=signed)
    return mean if found["spread"] is None else f"{mean} ± {figure(data, found['spread'])}"


def margin(data: Data, by: float) -> str:
    """A difference of the metric whatever its sign: 0.016 bits per byte, 1.20 percent points of accuracy."""
    title = data["metric"]["title"]
    return f"{figure(data, abs(by))} {f'percent points of {title}' if data['metric']['percent'] else title}"


def columns(data: Data) -> list[tuple[str, str]]:
    """Heads of the table, with a second line each."""
    against = data["table"]["against"]
    return [
        ("contender", ""), ("nonzeros", "start to end"), ("steps", ""), ("FLOPs", ""), ("seconds", "training"),
        ("ms", "a step"), final_column(data), (f"to {against}" if against else "difference", "by seed"),
        ("rewiring", "of time"), ("explored", ""),
    ]  # fmt: skip


def final_column(data: Data) -> tuple[str, str]:
    """Head of the column of what contenders are judged by."""
    return data["metric"]["title"] + (" %" if data["metric"]["percent"] else ""), "mean ± spread"


def cells(data: Data, row: Data) -> list[str]:
    """A row of the table as text, the label first."""
    nonzeros = say.DASH
    if row["nonzeros"] is not None:
        first, last = (say.count(round(value)) for value in row["nonzeros"])
        nonzeros = first if first == last else f"{first} to {last}"
    lost = [f"{row[what]} {what}" for what in ("diverged", "failed", "missing") if row[what]]
    final = spread(data, row["final"])
    return [
        row["label"],
        nonzeros,
        f"{row['steps']:,}",
        say.count(_mean(row["flops"])),
        _seconds(row["train_s"]),
        say.milliseconds(_scaled(_mean(row["step_s"]), 1e3)),
        f"{final} ({', '.join(lost)})" if lost else final,
        spread(data, row["difference"], signed=True),
        say.DASH if row["dense"] else say.percent(_mean(row["rewire_share"]), 2),
        say.percent(_mean(row["exploration"]), 3),
    ]


def _mean(found: Mapping[str, Any] | None) -> float | None:
    return None if found is None else found["mean"]


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else by * value


def _seconds(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return say.DASH
    digits = 0 if found["mean"] >= 100 else 1 if found["mean"] >= 10 else 2
    return f"{found['mean']:.{digits}f}" + ("" if found["spread"] is None else f" ± {found['spread']:.{digits}f}")


def legend(data: Data) -> list[str]:
    """What the columns mean."""
    lines = rule(data)
    if data["table"]["against"]:
        lines.append(
            f"to {data['table']['against']}: difference at the same seed, so at the same data order; its ± has no part "
            "of what seeds do to both."
        )
    lines.append(
        "FLOPs: forward, backward, and dense gradients scanned for growth. rewiring: choosing and moving, without that "
        "scan. explored: share of a sparse layer's units that were ever active."
    )
    return lines


def rule(data: Data) -> list[str]:
    """What is equal, and what contenders are judged by."""
    equal = {"steps": "steps", "minutes": "training time", "flops": "training FLOPs"}[data["budget"]["by"]]
    better = "higher" if data["metric"]["higher_is_better"] else "lower"
    lines = [
        f"Equal {equal}: {budget(data)}, {seeds_in_words(data)}. {data['metric']['title'].capitalize()} at the end, "
        f"{better} is better; ± is the standard deviation over seeds."
    ]
    return [*lines, data["judged"]] if data.get("judged") else lines


# -- sentences ------------------------------------------------------------------------------------------------------


def best(data: Data) -> list[str]:
    """Labels of the contender of the best mean, and of those that are not shown to be worse, in the table's order."""
    known = [row for row in data["table"]["rows"] if row["final"] is not None]
    if not known:
        return []
    sign = -1 if data["metric"]["higher_is_better"] else 1
    first = min(known, key=lambda row: sign * row["final"]["mean"])
    return [row["label"] for row in known if row is first or _level(row, first)]


def _level(row: Data, first: Data) -> bool:
    """Whether the mean difference by seed is within its spread; never said of fewer than two seeds."""
    differences = [value - first["finals"][seed] for seed, value in row["finals"].items() if seed in first["finals"]]
    return len(differences) > 1 and abs(fmean(differences)) <= stdev(differences)


def headline(data: Data) -> list[str]:
    """Who was best, and what that says of the baseline."""
    rows = {row["label"]: row for row in data["table"]["rows"]}
    ahead = best(data)
    if not ahead:
        return ["No run has finished."]
    sign = -1 if data["metric"]["higher_is_better"] else 1
    ahead.sort(key=lambda label: sign * rows[label]["final"]["mean"])
    unit = "%" if data["metric"]["percent"] else f" {data['metric']['title']}"
    first = f"{ahead[0]} is best, with {spread(data, rows[ahead[0]]['final'])}{unit}"
    if len(ahead) > 1:
        first += f"; {_listed(ahead[1:])} {'is' if len(ahead) == 2 else 'are'} within the spread of the difference"
    lines = [first + "."]
    against = data["table"]["against"]
    beyond = [
        row["label"] for row in rows.values()
        if row["difference"] is not None and row["difference"]["spread"] is not None
        and sign * row["difference"]["mean"] < -row["difference"]["spread"]
    ]  # fmt: skip
    if against and beyond:
        lines.append(f"Better than {against} by more than the spread of the difference: {_listed(beyond)}.")
    return lines


def notes(data: Data) -> list[str]:
    """What a reader should know before trusting the figures."""
    rows = data["table"]["rows"]
    lines = [f"{row['label']}, {message}" for row in rows for message in row["messages"]]
    if len(data["machines"]) > 1:
        lines.append("These runs come from different machines, threads or versions: their times do not compare.")
    lines += [disturbed(data)] if disturbed(data) else []
    if len(data["seeds"]) < 3:
        lines.append(f"{seeds_in_words(data).capitalize()}: three are the least that a claim can rest on.")
    lines += [
        f"{row['label']}: {row['warnings']} warnings of the guard rails, in its records."
        for row in rows
        if row["warnings"]
    ]
    return lines


def disturbed(data: Data) -> str:
    """A sentence when times differ by more than chance would have them; empty otherwise."""
    meant = 60 * data["budget"]["amount"] if data["budget"]["by"] == "minutes" else None
    off = []
    for row in data["table"]["rows"]:
        found = row["train_s"]
        if found is None:
            continue
        target = meant if meant is not None else found["mean"]
        if max(abs(found["mean"] - target), found["spread"] or 0.0) > DISTURBED * target:
            off.append(row["label"])
    if not off:
        return ""
    return (
        f"The times of {_listed(off)} are more than {say.percent(DISTURBED)} off the budget, or apart from seed to "
        "seed: something else used the machine. Steps and results are not touched by it; the seconds are."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
