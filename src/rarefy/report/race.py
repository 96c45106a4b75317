"""The page, the table and the sentences of a race: `rarefy race`, from its figures as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rarefy.files import atomic_write
from rarefy.report import comparison as comparing
from rarefy.report import numbers as say
from rarefy.report.comparison_figures import comparison_figures
from rarefy.report.page import flat, render_page

Data = Mapping[str, Any]

PAGE, DATA = "race.html", "race.json"


def is_race(folder: Path) -> bool:
    """Whether `rarefy race` has left its figures there."""
    return (folder / DATA).is_file()


def rebuild_race(folder: Path, out: Path | None = None) -> Path:
    """The page again, from the files of a race; see `build_race`.

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
        return build_race(folder, data, records, out)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, which {folder / DATA} names: run it again with rarefy race") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run it again with rarefy race") from error


def build_race(folder: Path, data: Data, records: Mapping[str, Data], out: Path | None = None) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
        data: what race.json says.
        records: digest -> record.
        out: the file; None: race.html in the folder.
    """
    path = folder / PAGE if out is None else out
    atomic_write(path, race_page(folder.name, data, records).encode())
    return path


def race_page(name: str, data: Data, records: Mapping[str, Data]) -> str:
    """The page as text: the verdict, curves, every seed's result, the table, the heats, what was asked."""
    sizes = sizes_of(data, records)
    verdict = data["verdict"]
    best = {verdict["best_dense"], verdict["best_sparse"]}
    return render_page(
        "comparison.html.j2",
        comparison_figures(data, records),
        title=name,
        about=f"{name} · {data['data']['name']} · {comparing.budget(data)} · {comparing.seeds_in_words(data)}",
        headline=sentences(data),
        notes=[*comparing.notes(data), *heats_in_words(data)],
        columns=columns(data),
        rows=[
            {"colour": at, "cells": cells(data, row, sizes), "best": row["label"] in best}
            for at, row in enumerate(data["table"]["rows"])
        ],
        legend=legend(data),
        machine=flat(data["machines"][0] if data["machines"] else {}),
        settings=flat(data["settings"]),
        made="Made by rarefy race.",
    )


# -- the table ------------------------------------------------------------------------------------------------------


def sizes_of(data: Data, records: Mapping[str, Data]) -> dict[str, dict[str, float]]:
    """Label -> bytes of training memory and of the saved network, means over seeds."""
    of: dict[str, list[Data]] = {}
    for run in data["runs"]:
        record = records.get(run["file"].rsplit("-", 1)[1].removesuffix(".json"))
        if record is not None and record.get("training_bytes"):
            of.setdefault(run["label"], []).append(record)
    return {
        label: {
            "memory": fmean(sum(record["training_bytes"].values()) for record in found),
            "file": fmean(record["file_bytes"] for record in found),
        }
        for label, found in of.items()
    }


def columns(data: Data) -> list[tuple[str, str]]:
    """Heads of the table, with a second line each."""
    return [
        ("contender", ""), ("weights", "that exist"), ("steps", ""), ("ms", "a step"), ("seconds", "training"),
        comparing.final_column(data), ("as good as dense", "share of its time"), ("memory", "training"), ("file", ""),
    ]  # fmt: skip


def cells(data: Data, row: Data, sizes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A row of the table as text, the label first."""
    label, nonzeros, steps, _, seconds, step, final, *_ = comparing.cells(data, row)
    size = sizes.get(label, {})
    share = say.DASH
    if label in data["verdict"]["shares"]:
        found = data["verdict"]["shares"][label]
        share = "never" if found is None else ratio(found)
    elif label == data["verdict"]["best_dense"]:
        share = "1"
    return [label, nonzeros, steps, step, seconds, final, share, say.nbytes(size.get("memory")),
            say.nbytes(size.get("file"))]  # fmt: skip


def ratio(found: Mapping[str, Any]) -> str:
    """0.71, or 0.71 ± 0.04 over seeds."""
    return f"{found['mean']:.2f}" + ("" if found["spread"] is None else f" ± {found['spread']:.2f}")


def legend(data: Data) -> list[str]:
    """What the columns mean."""
    lines = comparing.rule(data)
    dense = data["verdict"]["best_dense"]
    if dense is not None:
        lines.append(
            f"as good as dense: training time until the network was as good on held-out data as {dense} at its end, "
            "over that one's time, on straight lines between evaluations."
            + (" A curve is moved to end where its network does by all of them." if data.get("judged") else "")
        )
    lines.append(
        "All take turns, a two-hundredth of their run each. Times leave evaluations and checkpoints out and nothing "
        "else. memory: parameters, gradients, optimizer state and indices."
    )
    return lines


# -- sentences ------------------------------------------------------------------------------------------------------


def sentences(data: Data) -> list[str]:
    """The verdict, in plain words."""
    verdict = data["verdict"]
    dense, sparse = verdict["best_dense"], verdict["best_sparse"]
    rows = {row["label"]: row for row in data["table"]["rows"]}
    if verdict["winner"] == "open":
        missing = [side for side, label in (("dense", dense), ("sparse", sparse)) if label is None]
        if not missing:
            return [f"No verdict: {sparse} and {dense} have no seed that both finished."]
        return [f"No verdict: no {' and '.join(missing)} network finished."]
    difference, mark = verdict["difference"], _mark(data)
    ends = (
        f"{sparse} ends at {comparing.spread(data, rows[sparse]['final'])}{mark}, {dense} at "
        f"{comparing.spread(data, rows[dense]['final'])}{mark} {data['metric']['title']}; difference "
        f"{comparing.spread(data, difference, signed=True)}."
    )
    by = comparing.margin(data, difference["mean"])
    share, reverse = verdict["shares"].get(sparse), verdict["reverse"]
    if verdict["winner"] == "sparse":
        return [_won("Sparse", f"{sparse}", "dense", f"{dense}", share, by), ends]
    if verdict["winner"] == "dense":
        return [_won("Dense", f"{dense}", "sparse", f"{sparse}", reverse, by), ends]
    where = "level" if difference["spread"] is None else "within the spread of their difference"
    return [f"Neither wins here: {sparse} and {dense} end {where}.", ends]


def _mark(data: Data) -> str:
    """After a figure of the metric."""
    return "%" if data["metric"]["percent"] else ""


def _won(side: str, winner: str, other: str, loser: str, share: Mapping[str, Any] | None, by: str) -> str:
    if share is None:  # ahead on average, and not with every seed
        return f"{side} wins here: {winner} ends {by} ahead of the best {other} network, {loser}."
    return (
        f"{side} wins here: {winner} is as good as the best {other} network, {loser}, in {ratio(share)} of its time, "
        f"and ends {by} ahead."
    )


def heats_in_words(data: Data) -> list[str]:
    """How the finalists were chosen."""
    heats = data["heats"]
    if heats is None:
        return []
    rows = [row for row in heats["table"]["rows"] if row["final"] is not None]
    sign = -1 if data["metric"]["higher_is_better"] else 1
    rows.sort(key=lambda row: sign * row["final"]["mean"])
    listed = "; ".join(f"{row['label']} {comparing.figure(data, row['final']['mean'])}{_mark(data)}" for row in rows)
    num_dense = sum(row["dense"] for row in heats["table"]["rows"])
    return [
        f"Finalists were chosen by heats of {comparing.budget(heats)}, {num_dense} dense and "
        f"{len(heats['table']['rows']) - num_dense} sparse contenders: {listed}."
    ]
