"""The plots of a comparison: curves with the band of their seeds, and every seed's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rarefy.report.plots import PALETTE, Figure, View, gain_range, loss_range, name_axis, plain, plot_layout, rounded

Data = Mapping[str, Any]

DASHES = ("solid", "dash", "dot", "dashdot")

AXES = (
    ("Steps", "step", "step", "~s"),
    ("Seconds", "seconds", "seconds of training", "~s"),
    ("FLOPs", "flops", "floating-point operations of training", "~s"),
)


def comparison_figures(data: Data, records: Mapping[str, Data]) -> list[Figure]:
    """Every figure that there is something for, in reading order."""
    runs = finished_runs(data, records)
    drawn = (_curves(data, runs), _results(data, runs))
    return [figure for figure in drawn if figure is not None]


def finished_runs(data: Data, records: Mapping[str, Data]) -> dict[str, list[Data]]:
    """Label -> records of its finished runs, in the order of the table."""
    wanted = {row["label"]: [] for row in data["table"]["rows"]}
    by_file = {run["file"].rsplit("-", 1)[1].removesuffix(".json"): run["label"] for run in data["runs"]}
    for digest, record in records.items():
        if digest in by_file and record["state"] == "finished":
            wanted[by_file[digest]].append(record)
    return wanted


def _curves(data: Data, runs: Mapping[str, Sequence[Data]]) -> Figure | None:
    """The metric, and the loss where that is another, over steps, seconds and FLOPs."""
    if not any(runs.values()):
        return None
    metric = data["metric"]
    quantities = [(metric["key"], metric["title"])]
    if metric["percent"]:
        quantities.append(("loss", "loss"))
    views = []
    for key, title in quantities:
        for label, axis, described, ticks in AXES:
            name = (
                label
                if len(quantities) == 1
                else f"{title.capitalize()}, {label if label == 'FLOPs' else label.lower()}"
            )
            views.append(_curve_view(name, runs, key, title, axis, described, ticks))
    caption = (
        "Means over seeds at each evaluation on held-out data; the band is one standard deviation to either side. "
        "Against seconds, speed counts; against FLOPs, only arithmetic does."
    )
    return Figure("curves", "Curves", f"{caption} {data.get('judged', '')}".rstrip(), views)


def _curve_view(
    name: str, runs: Mapping[str, Sequence[Data]], key: str, title: str, axis: str, described: str, ticks: str
) -> View:
    traces: list[dict[str, Any]] = []
    heights: list[float] = []
    for place, (label, records) in enumerate(runs.items()):
        if records:
            traces += _line(label, place, mean_curve(records, key, axis), heights)
    rising = key == "accuracy"
    layout = plot_layout(430, x=described, y=title, legend=True)
    layout["xaxis"].update(tickformat=ticks, rangemode="tozero")
    layout["yaxis"]["range"] = gain_range(heights) if rising else loss_range(heights)
    layout["yaxis"]["tickformat"] = ".1%" if rising else ".2~f"
    return View(name, traces, layout)


def mean_curve(records: Sequence[Data], key: str, axis: str) -> list[tuple[float, float, float]]:
    """(x, mean, deviation; 0 of a single seed) at the evaluations that all seeds have.

    Seeds of a contender take the same steps, so that x differs between them by the clock alone, and is their mean.
    """
    curves = []
    for record in records:
        curve = record["curve"]
        along = record["clock"]["curve_s"] if axis == "seconds" else curve[axis]
        curves.append({step: (x, y) for step, x, y in zip(curve["step"], along, curve[key], strict=True)})
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = []
    for step in shared:
        ys = [curve[step][1] for curve in curves if curve[step][1] is not None]
        if len(ys) == len(curves):
            x = fmean(curve[step][0] for curve in curves)
            points.append((x, fmean(ys), stdev(ys) if len(ys) > 1 else 0.0))
    return points


def _line(
    label: str, place: int, points: Sequence[tuple[float, float, float]], heights: list[float]
) -> list[dict[str, Any]]:
    """A contender's mean, and its band."""
    colour, dash = f"@c{place % PALETTE}", DASHES[place // PALETTE % len(DASHES)]
    xs, ys = [rounded(x) for x, _, _ in points], [rounded(y) for _, y, _ in points]
    heights += [y for _, y, _ in points]
    traces: list[dict[str, Any]] = []
    if any(band for _, _, band in points):
        upper, lower = ([rounded(y + sign * band) for _, y, band in points] for sign in (1, -1))
        traces.append(
            {
                "type": "scatter", "mode": "lines", "showlegend": False, "hoverinfo": "skip", "legendgroup": str(place),
                "x": [*xs, *reversed(xs)], "y": [*upper, *reversed(lower)], "fill": "toself",
                "fillcolor": f"{colour}/0.15", "line": {"width": 0, "color": colour},
            }
        )  # fmt: skip
    traces.append(
        {
            "type": "scatter", "mode": "lines+markers", "name": plain(label), "meta": label, "legendgroup": str(place),
            "x": xs, "y": ys, "customdata": [rounded(band) for _, _, band in points],
            "line": {"color": colour, "width": 2.25, "dash": dash}, "marker": {"color": colour, "size": 5},
            "hovertemplate": f"%{{y:.4f}} ± %{{customdata:.4f}}<br>%{{x:,.4~g}}<extra>{plain(label)}</extra>",
        }
    )  # fmt: skip
    return traces


def _results(data: Data, runs: Mapping[str, Sequence[Data]]) -> Figure | None:
    """Where every seed ended, a line for each contender."""
    rows = [(place, label, records) for place, (label, records) in enumerate(runs.items()) if records]
    if not rows:
        return None
    percent = data["metric"]["percent"]
    form = ".2%" if percent else ".4f"
    traces = []
    for at, (place, label, records) in enumerate(rows):
        traces.append(
            {
                "type": "scatter", "mode": "markers", "showlegend": False, "name": plain(label), "meta": label,
                "x": [rounded(record["final"]) for record in records], "y": [at] * len(records),
                "customdata": [record["seed"] for record in records],
                "marker": {"color": f"@c{place % PALETTE}", "size": 11, "opacity": 0.75},
                "hovertemplate": f"seed %{{customdata}}: %{{x:{form}}}<extra>{plain(label)}</extra>",
            }
        )  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "markers", "showlegend": False, "hoverinfo": "skip",
                "x": [rounded(fmean(record["final"] for record in records))], "y": [at],
                "marker": {"color": "@ink", "size": 18, "symbol": "line-ns", "line": {"color": "@ink", "width": 2}},
            }
        )  # fmt: skip
    layout = plot_layout(70 + 34 * len(rows), x=f"{data['metric']['title']} at the end", y="")
    layout["xaxis"]["tickformat"] = ".1%" if percent else ".3~f"
    name_axis(layout["yaxis"], [label for _, label, _ in rows], reverse=True)
    layout["yaxis"]["range"] = [len(rows) - 0.5, -0.5]
    caption = "A point for each seed, a bar at their mean. What overlaps is not shown to differ."
    return Figure("results", "Every seed's result", caption, [View("Results", traces, layout)])
