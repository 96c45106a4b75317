"""The plots of a bench, from the plain data that `rarefy bench --json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.bench.contender import FUSED_NORMS
from rarefy.report import numbers as say
from rarefy.report.plots import PALETTE, Figure, View, name_axis, plain, plot_layout, rounded

Row = Mapping[str, Any]

DASHES = {"fp32": "solid", "medium": "dash", "bf16": "dot", "fp8": "dashdot"}
"""A block has its colour, a dtype its kind of line."""

PARTS = (("forward", "forward_ms"), ("backward", "backward_ms"), ("optimizer", "optimizer_ms"))


def bench_figures(data: Mapping[str, Any]) -> list[Figure]:
    """Every figure that the rows have something for, in reading order."""
    rows = data["rows"]
    layers, convs = ([row for row in rows if row["kind"] == kind] for kind in ("layer", "conv"))
    networks = [row for row in rows if row["kind"] in ("gpt", "cnn")]
    drawn = (
        _over_density(layers),
        _times("time", "Time of a layer", layers),
        _times("conv", "Time of a convolution", convs),
        _times("step", "Time of a whole training step", networks),
        _over_tokens(layers),
        _shares(rows),
    )
    return [figure for figure in drawn if figure is not None]


def subject(row: Row) -> str:
    """What a row timed: a layer and its tokens, a GPT, a convolution or a network."""
    if row.get("what"):
        return row["what"]
    size = "×".join(map(str, row["shape"]))
    return f"GPT {size}" if row["kind"] == "gpt" else f"{size}, {row['tokens']:,} tokens"


def contender(row: Row, *, with_density: bool = True) -> str:
    """Who was timed, in words."""
    if row["contender"] == "dense":
        more = " fused norms" if row["kernels"] == FUSED_NORMS else ""
        return f"dense {row['dtype']}" + (" compiled" if row["compiled"] else "") + more
    name = row["contender"]
    if name == "rarefy":
        name = f"{row['block'][0]}×{row['block'][1]} {row['dtype']}"
    return f"{name}, {say.percent(row['density'])}" if with_density else name


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by `subject`, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(subject(row), []).append(row)
    return groups


def _over_density(rows: Sequence[Row]) -> Figure | None:
    views = []
    for what, group in grouped(rows).items():
        ours = [row for row in group if row["contender"] == "rarefy" and row["speedup"]]
        if ours:
            views.append(_speed_view(what, ours, "density", "density (share of weights that exist)", ideal=True))
    caption = (
        "Forward and backward against the fastest dense layer that this machine has, in the same rounds, with "
        "quartiles. Above the dotted line sparse is faster; where a curve crosses it is the break-even density. The "
        "dashed line is what sparsity would give at the dense layer's own efficiency. Hover shows the speed against "
        "dense fp32."
    )
    return Figure("speed", "Speed against density", caption, views) if views else None


def _over_tokens(rows: Sequence[Row]) -> Figure | None:
    """Speed over token counts, of the thinnest pattern of each layer; None unless there are two counts."""
    ours = [row for row in rows if row["contender"] == "rarefy" and row["speedup"]]
    views = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in ours):
        of_shape = [row for row in ours if tuple(row["shape"]) == shape]
        least = {tuple(r["block"]): min(x["density"] for x in of_shape if x["block"] == r["block"]) for r in of_shape}
        thin = [row for row in of_shape if row["density"] == least[tuple(row["block"])]]
        if len({row["tokens"] for row in thin}) > 1:
            label = "×".join(map(str, shape))
            views.append(_speed_view(label, thin, "tokens", "tokens (rows of input)", ideal=False))
    caption = "The thinnest pattern of each kind, against the fastest dense layer at the same number of tokens."
    return Figure("tokens", "Speed against tokens", caption, views) if views else None


def _speed_view(label: str, rows: Sequence[Row], axis: str, title: str, *, ideal: bool) -> View:
    """A line for each block and dtype over a log axis."""
    data: list[dict[str, Any]] = []
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(contender(row, with_density=False), []).append(row)
    places = {tuple(block): place for place, block in enumerate(dict.fromkeys(tuple(row["block"]) for row in rows))}
    for name, line in lines.items():
        line = sorted(line, key=lambda row: row[axis])
        colour = f"@c{places[tuple(line[0]['block'])] % PALETTE}"
        speeds = [row["speedup"] for row in line]
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": plain(name), "meta": name,
                "x": [row[axis] for row in line], "y": [rounded(s["median"]) for s in speeds],
                "error_y": {
                    "type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": colour,
                    "array": [rounded(s["q3"] - s["median"]) for s in speeds],
                    "arrayminus": [rounded(s["median"] - s["q1"]) for s in speeds],
                },
                "customdata": [_hover(row) for row in line],
                "line": {"color": colour, "width": 2, "dash": DASHES[line[0]["dtype"]]},
                "marker": {"color": colour, "size": 7},
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )  # fmt: skip
    where = sorted({row[axis] for row in rows})
    if ideal:
        data.append(
            {
                "type": "scatter", "mode": "lines", "showlegend": False, "hoverinfo": "skip",
                "x": where, "y": [rounded(1 / x) for x in where],
                "line": {"color": "@ink-3", "width": 1.25, "dash": "dash"},
            }
        )  # fmt: skip
    layout = plot_layout(380, x=title, y="times as fast as dense", legend=True)
    layout["xaxis"].update(
        type="log", tickangle=0, tickvals=where, ticktext=[say.count(x) if x >= 1 else f"{x:.3g}" for x in where]
    )
    layout["yaxis"].update(type="log", tickvals=[0.25, 0.5, 1, 2, 4, 8, 16], tickformat="~g")
    level = {"color": "@ink-3", "width": 1.25, "dash": "dot"}
    layout["shapes"] = [
        {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 1, "y1": 1, "line": level, "layer": "below"}
    ]
    return View(label, data, layout)


def _hover(row: Row) -> str:
    speed, fp32 = row["speedup"], row["speedup_fp32"]
    lines = [f"<b>{plain(contender(row))}</b>, {row['tokens']:,} tokens"]
    if speed:
        lines.append(f"{say.times(speed['median'])} the fastest dense ({plain(row['fastest'])})")
    if fp32:
        lines.append(f"{say.times(fp32['median'])} dense fp32")
    compared = row["forward_ms"] if row["forward_only"] else row["total_ms"]
    lines.append(f"{say.milliseconds(compared['median'])} ms" + (", forward alone" if row["forward_only"] else ""))
    if row["efficiency"]:
        lines.append(f"efficiency {row['efficiency']:.2f}")
    if row["share"]:
        lines.append(f"{say.percent(row['share'], 2)} of the ceiling")
    return "<br>".join(lines)


def _times(id: str, title: str, rows: Sequence[Row]) -> Figure | None:
    """Medians, stacked by part, a bar for each contender."""
    views = [_time_view(what, group) for what, group in grouped(rows).items()]
    caption = "Medians in milliseconds. The speed behind a bar is against the fastest dense one"
    caption += ", and * means that only the forward is compared." if id == "time" else "."
    return Figure(id, title, caption, views) if views else None


def _time_view(label: str, rows: Sequence[Row]) -> View:
    data = []
    for place, (part, key) in enumerate(PARTS):
        if any(row[key] for row in rows):
            data.append(
                {
                    "type": "bar", "orientation": "h", "name": part, "meta": part, "y": list(range(len(rows))),
                    "x": [rounded(row[key]["median"]) if row[key] else None for row in rows],
                    "customdata": [_hover(row) for row in rows], "hovertemplate": "%{customdata}<extra></extra>",
                    "marker": {"color": f"@p{place}", "line": {"width": 1, "color": "@surface"}},
                }
            )  # fmt: skip
    sums = [sum(row[key]["median"] for _, key in PARTS if row[key]) for row in rows]
    ends = []
    for row, total in zip(rows, sums, strict=True):
        speed = row["speedup"]
        mark = "" if speed is None else f"  {say.times(speed['median'])}" + ("*" if row["forward_only"] else "")
        whole = row["total_ms"]["median"] if row["total_ms"] else total  # medians of parts need not add up to it
        ends.append(f"<b>{say.milliseconds(whole)}</b>{mark}")
    layout = _bars(rows, sums, ends, legend=True)
    layout["xaxis"]["ticksuffix"] = " ms"
    layout["barmode"] = "stack"
    return View(label, data, layout)


def _shares(rows: Sequence[Row]) -> Figure | None:
    """Useful arithmetic as a share of the measured ceiling."""
    views = []
    for what, group in grouped([row for row in rows if row["share"]]).items():
        shares = [100 * row["share"] for row in group]
        data = [
            {
                "type": "bar", "orientation": "h", "name": "share", "y": list(range(len(group))),
                "x": [rounded(share) for share in shares],
                "customdata": [_hover(row) for row in group], "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {"color": ["@c7" if row["contender"] == "dense" else "@c0" for row in group]},
            }
        ]  # fmt: skip
        ends = [f"<b>{say.percent(row['share'], 2)}</b>  {say.count(row['gflops'] * 1e9)}FLOP/s" for row in group]
        layout = _bars(group, shares, ends, legend=False)
        layout["xaxis"]["ticksuffix"] = "%"
        views.append(View(what, data, layout))
    caption = (
        "Useful arithmetic, 2 × weights that exist × tokens a product, as a part of what the probe reached with the "
        "arithmetic that the contender may use. Dense bf16 may use matrix tiles, where there are some: its ceiling is "
        "many times higher."
    )
    return Figure("share", "Share of the machine's ceiling", caption, views) if views else None


def _bars(rows: Sequence[Row], sums: Sequence[float], ends: Sequence[str], *, legend: bool) -> dict[str, Any]:
    """A layout of horizontal bars with a text at the end of each."""
    layout = plot_layout(60 + 26 * len(rows), x="", y="", legend=legend)
    layout["bargap"] = 0.3
    layout["xaxis"].update(nticks=5, range=[0, rounded(max(sums) * 1.34) or 1.0])
    layout["annotations"] = [
        {
            "x": rounded(total), "y": place, "text": text, "showarrow": False, "xanchor": "left", "xshift": 6,
            "font": {"size": 12, "color": "@ink"},
        }
        for place, (total, text) in enumerate(zip(sums, ends, strict=True))
    ]  # fmt: skip
    name_axis(layout["yaxis"], [contender(row) for row in rows], reverse=True)
    return layout
