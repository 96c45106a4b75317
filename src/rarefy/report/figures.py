"""What every run has to show: its course, its pattern, its cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from rarefy.report import numbers as say
from rarefy.report.compare import Contender, listed
from rarefy.report.courses import courses
from rarefy.report.plots import PALETTE, Figure, View, colour_of, dash_of, name_axis, plain, plot_layout, rounded, thin
from rarefy.report.read import Record, number, numbers

MAX_LINES = 6
"""Layers that are drawn as lines; more become a heatmap, which needs no legend."""

MAX_COLUMNS = 90
"""Columns of a heatmap."""

MAX_BARS = 40
"""Layers that get a labelled bar each; more become columns that say their name on hover."""

TIME_PARTS = ("forward", "backward", "optimizer", "rewire", "data", "other")
MEMORY_PARTS = ("parameters", "gradients", "optimizer", "indices")
PART_COLOUR = {
    "forward": 0, "parameters": 0, "backward": 1, "gradients": 1, "optimizer": 2,
    "rewire": 3, "indices": 3, "data": 4, "other": 5,
}  # fmt: skip
"""The same colour for what belongs together; amber is what only a sparse network pays for."""


def all_figures(field: Sequence[Contender]) -> list[Figure]:
    """Every figure that the data has something for, in reading order."""
    drawn = (*courses(field), density(field), *rewires(field), empties(field), time_split(field), memory(field))
    return [figure for figure in drawn if figure is not None]


# Pattern


def density(field: Sequence[Contender]) -> Figure | None:
    """Density per layer, the dense ones hatched and with their reason."""
    views = []
    for contender, plan in _plans(field):
        layers = plan["layers"]
        if not layers:
            continue
        views.append(_density_view(contender, layers))
    if not views:
        return None
    caption = (
        "The part of each layer's weights that exists, in the order of the network. Hatched layers are dense; hover "
        "says why. Very thin layers are where a network may lose its signal."
    )
    return Figure("density", "Density per layer", caption, views, wide=len(views[0].data[0]["customdata"]) > MAX_LINES)


def _density_view(contender: Contender, layers: Sequence[Record]) -> View:
    names = [str(layer.get("name", "")) for layer in layers]
    dense = [layer.get("kind") == "dense" for layer in layers]
    values = [1.0 if is_dense else number(layer, "density") for layer, is_dense in zip(layers, dense, strict=True)]
    hover = [
        f"<b>{plain(name)}</b><br>{say.percent(value)} of {plain(_shape(layer))}"
        + (f"<br>dense: {plain(_wrapped(layer.get('reason') or 'no reason given'))}" if is_dense else "")
        for name, layer, value, is_dense in zip(names, layers, values, dense, strict=True)
    ]
    upright = len(layers) > MAX_BARS
    across, along = ("y", "x") if upright else ("x", "y")
    bars = {
        "type": "bar",
        "orientation": "v" if upright else "h",
        across: [rounded(value) for value in values],
        along: list(range(len(layers))),
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {
            "color": ["@ink-3" if is_dense else colour_of(contender) for is_dense in dense],
            "pattern": {
                "shape": ["/" if is_dense else "" for is_dense in dense],
                "bgcolor": "@ink-3/0.2",
                "fillmode": "replace",  # the bar's colour is that of the hatching
                "size": 5,
                "solidity": 0.2,
            },
            "line": {"width": 0},
        },
        "showlegend": False,
    }
    if not upright:
        bars["text"] = [say.percent(value) for value in values]
        bars["textposition"] = "outside"
        bars["textfont"] = {"size": 11, "color": "@ink-2"}
        bars["cliponaxis"] = False
    layout = plot_layout(330 if upright else 46 + 22 * len(layers), x="", y="")
    layout["bargap"] = 0.12 if upright else 0.3
    layout[f"{across}axis"].update(
        tickformat=".0%", range=[0, 1.0 if upright else 1.12], tickvals=[0, 0.25, 0.5, 0.75, 1]
    )
    name_axis(layout[f"{along}axis"], names, reverse=not upright, every=math.ceil(len(names) / 24) if upright else 1)
    if upright:
        layout["xaxis"]["tickangle"] = -60
    return View(contender.label, [bars], layout)


def rewires(field: Sequence[Contender]) -> list[Figure]:
    """Churn, exploration and newborn survival over the steps, by layer and on average."""
    wanted = (
        (
            "churn", "Churn", ".1%",
            "The part of a layer's units that one rewire replaced. It should follow the schedule and fade out before "
            "the end; a layer that stays high never settles.",
        ),
        (
            "exploration", "Exploration", ".1%",
            "The part of all possible units that have been active at some time. It starts at the density and climbs "
            "while rewiring finds new places; a flat line means that the same units come and go.",
        ),
        (
            "newborn_survival", "Newborn survival", ".0%",
            "Of the units that the previous rewire grew, the part that this one kept. Near zero, growth is wasted: "
            "newborns need more time or a gentler start.",
        ),
    )  # fmt: skip
    rewired = [contender for contender in field if contender.twin.rewire]
    figures = []
    for key, title, ticks, caption in wanted:
        views = []
        if mean := _mean_view(field, key, ticks):
            views.append(mean)
        for contender in rewired:
            if view := _layers_view(contender, key, ticks, label="By layer" if len(rewired) == 1 else contender.label):
                views.append(view)
        if views:
            figures.append(Figure(key.replace("_", "-"), title, caption, views, wide=key == "churn"))
    return figures


def _mean_view(field: Sequence[Contender], key: str, ticks: str) -> View | None:
    """The mean over layers, one line per contender, with the range from the lowest to the highest layer."""
    data = []
    drawn = [contender for contender in field if any(math.isfinite(y) for y in numbers(contender.twin.rewire, key))]
    for contender in drawn:
        edges = _columns(contender.twin.rewire)
        columns: list[list[float]] = [[] for _ in edges]
        for record in contender.twin.rewire:
            if math.isfinite(value := number(record, key)):
                columns[_column(edges, record["step"])].append(value)
        # A column with few of the layers (the last one, often) would show these layers, not the course of the mean.
        enough = max(len(column) for column in columns) / 2
        kept = [(edge, column) for edge, column in zip(edges, columns, strict=True) if len(column) >= enough]
        steps = [edge for edge, _ in kept]
        colour, name = colour_of(contender), plain(contender.label)
        if any(len(column) > 1 for _, column in kept):
            around = [max(column) for _, column in kept] + [min(column) for _, column in reversed(kept)]
            data.append(
                {
                    "type": "scatter", "mode": "lines", "x": steps + steps[::-1], "y": [rounded(y) for y in around],
                    "fill": "toself", "fillcolor": f"{colour}/0.13", "line": {"width": 0, "color": f"{colour}/0"},
                    "legendgroup": str(contender.colour), "showlegend": False, "hoverinfo": "skip",
                }
            )  # fmt: skip
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(kept) < 30 else "lines",
                "name": name,
                "meta": contender.label,
                "legendgroup": str(contender.colour),
                "x": steps,
                "y": [rounded(statistics.fmean(column)) for _, column in kept],
                "line": {"color": colour, "width": 2.25, "dash": dash_of(contender)},
                "marker": {"color": colour, "size": 5},
                "hovertemplate": f"%{{y:{ticks}}}<br>about step %{{x:,}}<extra>{name}, mean</extra>",
            }
        )
    if not data:
        return None
    layout = plot_layout(290, x="step", y="", legend=len(drawn) > 1)
    layout["yaxis"].update(tickformat=ticks.replace(".1", ".2~"), rangemode="tozero")
    layout["xaxis"].update(tickformat="~s")
    return View("All layers", data, layout)


def _layers_view(contender: Contender, key: str, ticks: str, label: str) -> View | None:
    """A line per layer, or a heatmap where lines would be a tangle."""
    records = [record for record in contender.twin.rewire if math.isfinite(number(record, key))]
    if not records:
        return None
    names = _layer_order(contender, records)
    if len(names) <= MAX_LINES:
        data = []
        for place, name in enumerate(names):
            own = [(record["step"], number(record, key)) for record in records if str(record.get("layer")) == name]
            data.append(
                {
                    "type": "scatter", "mode": "lines+markers" if len(own) < 30 else "lines", "name": plain(name),
                    "meta": name,
                    "x": [step for step, _ in thin(own)], "y": [rounded(y) for _, y in thin(own)],
                    "line": {"color": f"@c{place % PALETTE}", "width": 2},
                    "marker": {"color": f"@c{place % PALETTE}", "size": 5},
                    "hovertemplate": f"%{{y:{ticks}}}<br>step %{{x:,}}<extra>{plain(name)}</extra>",
                }
            )  # fmt: skip
        layout = plot_layout(290, x="step", y="", legend=True)
        layout["yaxis"].update(tickformat=ticks.replace(".1", ".2~"), rangemode="tozero")
    else:
        data = [_heatmap(contender, names, records, key, ticks)]
        layout = plot_layout(min(640, 90 + max(8, 20 - len(names) // 8) * len(names)), x="step", y="")
        layout["yaxis"].update(showgrid=False)
        layout["xaxis"].update(showgrid=False)
        name_axis(layout["yaxis"], names, reverse=True, every=math.ceil(len(names) / 32))
    layout["xaxis"].update(tickformat="~s")
    return View(label, data, layout)


def _heatmap(
    contender: Contender, names: Sequence[str], records: Sequence[Record], key: str, ticks: str
) -> dict[str, Any]:
    edges = _columns(records)
    row = {name: place for place, name in enumerate(names)}
    cells: list[list[list[float]]] = [[[] for _ in edges] for _ in names]
    for record in records:
        cells[row[str(record.get("layer"))]][_column(edges, record["step"])].append(number(record, key))
    return {
        "type": "heatmap",
        "x": edges,
        "y": list(range(len(names))),
        "z": [[rounded(statistics.fmean(cell)) if cell else None for cell in line] for line in cells],
        "customdata": [[plain(name)] * len(edges) for name in names],
        "hovertemplate": f"<b>%{{customdata}}</b><br>%{{z:{ticks}}}<br>from step %{{x:,}}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "colorscale": [[0, "@low"], [1, colour_of(contender)]],
        "colorbar": {
            "thickness": 10, "outlinewidth": 0, "nticks": 5, "len": 1, "xpad": 6,
            "tickformat": ticks.replace(".1", ".2~"), "tickfont": {"size": 11, "color": "@ink-2"},
        },
    }  # fmt: skip


def _columns(records: Sequence[Record]) -> list[int]:
    """First steps of equal columns: as wide as a layer's usual interval, so that a column has one rewire of each."""
    steps_of: dict[str, list[int]] = {}
    for record in records:
        steps_of.setdefault(str(record.get("layer")), []).append(record["step"])
    gaps = [after - before for steps in steps_of.values() for before, after in pairwise(steps)]
    first = min(record["step"] for record in records)
    last = max(record["step"] for record in records)
    width = max(1, round(statistics.median(gaps))) if gaps else last - first + 1
    width *= math.ceil((last - first + 1) / width / MAX_COLUMNS)
    return list(range(first, last + 1, width))


def _column(edges: Sequence[int], step: int) -> int:
    return min((step - edges[0]) // (edges[1] - edges[0]), len(edges) - 1) if len(edges) > 1 else 0


def empties(field: Sequence[Contender]) -> Figure | None:
    """Empty rows and columns over all layers, outputs and inputs with no connection; None when there are none."""
    data = []
    for contender in field:
        latest: dict[str, float] = {}
        totals: dict[int, float] = {}
        for record in contender.twin.rewire:
            both = [n for n in (number(record, "empty_rows"), number(record, "empty_cols")) if math.isfinite(n)]
            latest[str(record.get("layer"))] = sum(both)
            totals[record["step"]] = sum(latest.values())
        if any(totals.values()):
            points = thin(list(totals.items()))
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": plain(contender.label),
                    "meta": contender.label,
                    "x": [step for step, _ in points],
                    "y": [total for _, total in points],
                    "line": {"color": colour_of(contender), "width": 2.25, "shape": "hv", "dash": dash_of(contender)},
                    "hovertemplate": f"%{{y:,}}<br>step %{{x:,}}<extra>{plain(contender.label)}</extra>",
                }
            )
    if not data:
        return None
    layout = plot_layout(260, x="step", y="", legend=len(data) > 1)
    layout["yaxis"].update(rangemode="tozero", tickformat=",")
    layout["xaxis"].update(tickformat="~s")
    caption = (
        "Rows and columns of the sparse layers without a single weight, over all layers: outputs that are only a bias "
        "and inputs that nobody reads. A few are harmless; a rising line says that the network is narrowing."
    )
    return Figure("empty", "Empty rows and columns", caption, [View("", data, layout)])


# Cost


def time_split(field: Sequence[Contender]) -> Figure | None:
    """Milliseconds per step by part, a bar per contender."""
    split = {contender: parts for contender in field if (parts := time_per_step(contender))}
    if not split:
        return None
    notes = []
    for contender, parts in split.items():
        if not contender.dense and parts.get("rewire"):
            notes.append(f"{say.percent(parts['rewire'] / sum(parts.values()), 2)} in {contender.label}")
    caption = "An average training step and what its time went into; shorter is faster."
    if notes:
        caption += f" Rewiring takes {listed(notes)}."
    totals = [sum(parts.values()) for parts in split.values()]
    in_s = max(totals) >= 0.0995
    view = _stack(split, TIME_PARTS, say.step_times(totals), " s" if in_s else " ms", scale=1.0 if in_s else 1e3)
    return Figure("time", "Where the time went", caption.strip(), [view], wide=False)


def time_per_step(contender: Contender) -> dict[str, float]:
    """Average seconds per step by part, and what the parts leave of the training time as "other"."""
    records = contender.twin.time
    if not records or records[-1]["step"] <= 0:
        return {}
    last = records[-1]
    parts = {part: number(last, f"{part}_s") / last["step"] for part in TIME_PARTS[:-1]}
    parts = {part: seconds for part, seconds in parts.items() if math.isfinite(seconds) and seconds >= 0}
    left = contender.mean_step_s - sum(parts.values())
    if parts and left > 0.01 * sum(parts.values()):
        parts["other"] = left
    return parts


def memory(field: Sequence[Contender]) -> Figure | None:
    """Training memory by part, a bar per contender."""
    split = {contender: parts for contender in field if (parts := contender.training_bytes)}
    if not split:
        return None
    caption = (
        "What training keeps from step to step; indices are the price of a pattern and counted. "
        "Activations are not in it: they depend on the batch and are the same for all."
    )
    others = sorted({part for parts in split.values() for part in parts} - set(MEMORY_PARTS))
    unit = max(sum(parts.values()) for parts in split.values())
    power = 0 if unit < 2**10 else 1 if unit < 2**20 else 2 if unit < 2**30 else 3
    suffix = (" B", " KiB", " MiB", " GiB")[power]
    view = _stack(split, (*MEMORY_PARTS, *others), say.nbytes, suffix, scale=1024.0**-power)
    return Figure("memory", "Training memory", caption, [view], wide=False)


def _stack(
    split: dict[Contender, dict[str, float]],
    parts: Sequence[str],
    form: Callable[[float], str],
    suffix: str,
    scale: float = 1.0,
) -> View:
    """Horizontal stacked bars with the total at their end."""
    rows = list(split)
    totals = [sum(split[contender].values()) for contender in rows]
    data = []
    for part in parts:
        values = [split[contender].get(part, 0.0) for contender in rows]
        if not any(values):
            continue
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plain(part),
                "meta": part,
                "x": [rounded(value * scale) for value in values],
                "y": list(range(len(rows))),
                "customdata": [
                    f"<b>{plain(contender.label)}</b><br>{plain(part)} {form(value)}"
                    + (f", {say.percent(value / total)}" if total else "")
                    for contender, value, total in zip(rows, values, totals, strict=True)
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {"color": f"@p{PART_COLOUR.get(part, 5)}", "line": {"width": 1, "color": "@surface"}},
            }
        )
    layout = plot_layout(60 + 44 * len(rows), x="", y="", legend=True)
    layout["barmode"] = "stack"
    layout["bargap"] = 0.38
    layout["xaxis"].update(ticksuffix=suffix, nticks=5, range=[0, (rounded(max(totals) * scale * 1.34) or 1.0)])
    layout["annotations"] = [
        {
            "x": rounded(total * scale), "y": place, "text": f"<b>{form(total)}</b>", "showarrow": False,
            "xanchor": "left", "xshift": 6, "font": {"size": 12, "color": "@ink"},
        }
        for place, total in enumerate(totals)
    ]  # fmt: skip
    name_axis(layout["yaxis"], [contender.label for contender in rows], reverse=True)
    return View("", data, layout)


# What figures look up


def _plans(field: Sequence[Contender]) -> Iterable[tuple[Contender, Record]]:
    """The plan of each run, under its first sparse contender."""
    seen = set()
    for contender in sorted(field, key=lambda contender: (contender.dense, contender.colour)):
        if contender.run.plan is not None and contender.run.path not in seen:
            seen.add(contender.run.path)
            yield contender, contender.run.plan


def _layer_order(contender: Contender, records: Sequence[Record]) -> list[str]:
    """As in the plan, which is the network's order; else as they first rewired."""
    met = list(dict.fromkeys(str(record.get("layer")) for record in records))
    plan = contender.run.plan
    order = {str(layer.get("name")): place for place, layer in enumerate(plan["layers"])} if plan else {}
    return sorted(met, key=lambda name: order.get(name, len(order)))


def _shape(layer: Record) -> str:
    shape = layer.get("shape")
    return " × ".join(f"{size}" for size in shape) if isinstance(shape, list) else "?"


def _wrapped(text: object, limit: int = 160) -> str:
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
