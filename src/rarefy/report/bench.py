"""The page of a bench: `rarefy bench --html FILE`, from the data that --json prints, of this run or an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.report import numbers as say
from rarefy.report.bench_figures import Row, bench_figures, contender, grouped, subject
from rarefy.report.page import flat, render_page


def bench_page(data: Mapping[str, Any]) -> str:
    """The page as text: a sentence, the ceilings, plots, every figure in tables, the machine and what was asked."""
    machine = data["machine"]
    return render_page(
        "bench.html.j2",
        bench_figures(data),
        title=f"bench {machine['date'][:10]}",
        about=_about(data),
        headline=_headline(data["rows"]),
        notes=[*_disturbed(data["check"]), *data["notes"]],
        cards=[_card(name, both) for name, both in data["check"]["readings"].items()],
        tables=[_table(what, rows) for what, rows in grouped(data["rows"]).items()],
        break_evens=[_break_even(found) for found in data["break_even"]],
        machine=flat(machine),
        settings=flat({**data["settings"], "seconds taken": data["seconds"]}),
    )


def _about(data: Mapping[str, Any]) -> str:
    """The machine in a line."""
    machine = data["machine"]
    if data["settings"].get("device", "cpu") != "cpu":
        return f"{machine['gpu']} · {machine['date'][:10]}"
    return f"{machine['cpu']} · {machine['threads']} threads · {machine['isa']} · {machine['date'][:10]}"


def _headline(rows: Sequence[Row]) -> list[str]:
    """One sentence on the thinnest layers, and one on training steps, against the fastest dense and dense fp32."""
    said = []
    for kind, what in (
        ("layer", "sparse layers run"),
        ("conv", "sparse convolutions run"),
        ("gpt", "a sparse GPT trains"),
        ("cnn", "sparse networks for images train"),
    ):
        ours = [row for row in rows if row["kind"] == kind and row["contender"] == "rarefy" and row["speedup"]]
        if not ours:
            continue
        thinnest = min(row["density"] for row in ours)
        asked = [row for row in ours if row["density"] <= 1.05 * thinnest]
        best, fp32 = (_span([row[key]["median"] for row in asked]) for key in ("speedup", "speedup_fp32"))
        against = "dense fp32" if best == fp32 else f"the fastest dense torch here, and {fp32} as fast as dense fp32"
        said.append(f"At {say.percent(thinnest, 2)} density, {what} {best} as fast as {against}.")
    return said or ["Dense torch alone was timed."]


def _span(speeds: Sequence[float]) -> str:
    """The lowest and the highest, in words."""
    low, high = say.times(min(speeds)), say.times(max(speeds))
    return low if low == high else f"{low} to {high}"


def _disturbed(check: Mapping[str, Any]) -> list[str]:
    if not check["disturbed"]:
        return []
    return [
        f"Something else used the machine: {check['worst']} moved by {say.percent(check['moved'], 2)} between start "
        "and end. Do not use these figures; repeat on an idle machine."
    ]


def _card(name: str, both: Mapping[str, float]) -> dict[str, str]:
    """A reading of the machine, first and last."""
    unit = "ms" if name == "dense reference" else "GB/s" if name.endswith(("read", "copy")) else "GFLOP/s"
    first, last = (say.milliseconds(both[when]) for when in ("first", "last"))
    return {"what": name, "big": first, "unit": unit, "after": f"{last} afterwards"}


COLUMNS = (
    ("Forward", "ms", "forward_ms"), ("dX", "ms, alone", "dx_ms"), ("dW", "ms, alone", "dw_ms"),
    ("Backward", "ms", "backward_ms"), ("Optimizer", "ms", "optimizer_ms"), ("Total", "ms", "total_ms"),
)  # fmt: skip


def _table(what: str, rows: Sequence[Row]) -> dict[str, Any]:
    """All rows of a layer or a GPT; columns that none of them fills are left out."""
    times = [column for column in COLUMNS if any(row[column[2]] for row in rows)]
    head = [*((name, under) for name, under, _ in times), ("Speed", "to dense fp32"), ("Speed", "to fastest dense")]
    head += [("Quartiles", ""), ("Efficiency", ""), ("Of ceiling", ""), ("Growth", "to dense dW"), ("Rounds", "")]
    body = []
    for row in rows:
        speed, mark = row["speedup"], "*" if row["forward_only"] else ""
        cells = [say.milliseconds(row[key]["median"]) if row[key] else "" for _, _, key in times]
        cells += [say.times(s["median"]) + mark if s else "" for s in (row["speedup_fp32"], speed)]
        cells += [
            f"{speed['q1']:.2f} to {speed['q3']:.2f}" if speed else "",
            f"{row['efficiency']:.2f}" if row["efficiency"] is not None else "",
            say.percent(row["share"], 2) if row["share"] else "",
            say.times(row["growth_ratio"]["median"]) if row["growth_ratio"] else "",
            str(row["rounds"]),
        ]
        slower = row["contender"] != "dense" and speed is not None and speed["median"] < 1
        body.append({"who": contender(row), "kernels": row["kernels"], "cells": cells, "slower": slower})
    return {"what": what, "head": head, "rows": body, "speed_at": len(times) + 1}


def _break_even(found: Mapping[str, Any]) -> dict[str, str]:
    return {
        "what": subject({**found, "kind": "layer"}),
        "who": f"{found['block'][0]}×{found['block'][1]} {found['dtype']}",
        "fp32": _crossing(found["against_fp32"]),
        "fastest": _crossing(found["against_fastest"]),
    }


def _crossing(found: Mapping[str, float | None]) -> str:
    low, high = say.percent(found["faster_at"]), say.percent(found["slower_at"])
    if found["density"] is not None:
        return f"about {say.percent(found['density'], 2)} (between {low} and {high})"
    return f"faster up to {low}" if found["faster_at"] is not None else f"slower from {high}"
