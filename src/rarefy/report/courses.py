"""What is followed over the run: accuracy or loss, against time, steps and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.report import numbers as say
from rarefy.report.compare import Contender, reading
from rarefy.report.plots import (
    Figure,
    View,
    colour_of,
    dash_of,
    gain_range,
    loss_range,
    plain,
    plot_layout,
    rounded,
    smooth,
    thin,
)
from rarefy.report.read import Record, number
from rarefy.training.subject import ACCURACY, BITS_PER_BYTE, TEXT


@dataclass(frozen=True)
class Course:
    """A figure that is followed over the run."""

    id: str
    title: str
    unit: str
    """After a value, and on the axis."""
    of: Callable[[Record], float]
    caption: str
    form: str = ".3f"
    """Of a value, as d3 writes it."""
    ticks: str = ".2~f"
    higher_is_better: bool = False
    training: bool = True
    """Whether training records have it too."""
    parts: bool = False
    """Whether evaluations may part from training, as where images are learned by heart: the later ones are in view."""


READ_AS = (
    "what counts is the gap at the dotted line, the last moment that all have reached. Against steps, speed does not "
    "count; against FLOPs, only arithmetic does. Double-click shows the start as well."
)

TEXT_LOSS = Course(
    "loss", "Loss", BITS_PER_BYTE.title, BITS_PER_BYTE.of,
    "Points are evaluations on held-out text, the faint line is training loss, smoothed. Lower is better; " + READ_AS,
)  # fmt: skip
IMAGE_ACCURACY = Course(
    "accuracy", "Accuracy", ACCURACY.title, ACCURACY.of,
    "The share of held-out images that are told apart, at each evaluation. Higher is better; " + READ_AS,
    form=".2%", ticks=".1~%", higher_is_better=True, training=False,
)  # fmt: skip
IMAGE_LOSS = Course(
    "loss", "Loss", "nats", lambda record: number(record, "loss"),
    "Cross-entropy: points are evaluations on held-out images, the faint line is training, smoothed, with whatever "
    "shifts, flips and label smoothing make harder there. Lower is better.",
    parts=True,
)  # fmt: skip


def courses(field: Sequence[Contender]) -> list[Figure]:
    """What the networks are judged by, and their loss, against time, steps and FLOPs."""
    wanted = (TEXT_LOSS,) if not field or field[0].run.subject is TEXT else (IMAGE_ACCURACY, IMAGE_LOSS)
    return [figure for what in wanted if (figure := _course(field, what))]


def _course(field: Sequence[Contender], what: Course) -> Figure | None:
    longest = max((number(record, "train_s") for c in field for record in (*c.twin.train, *c.twin.eval)), default=0.0)
    unit, per = ("s", 1) if not longest > 300 else ("min", 60) if longest <= 3 * 3600 else ("h", 3600)
    axes = (
        ("Time", "train_s", "training time", {"ticksuffix": f" {unit}"}),
        ("Steps", "step", "step", {"tickformat": "~s"}),
        ("FLOPs", "flops", "floating-point operations", {"tickformat": "~s"}),
    )
    views = []
    for label, axis, title, ticks in axes:
        scale = 1 / per if axis == "train_s" else 1.0
        data: list[dict[str, Any]] = []
        heights: list[float] = []
        for contender in field:
            data += _course_traces(contender, what, axis, scale, heights)
        if not data:
            continue
        layout = plot_layout(400, x=title, y=what.unit, legend=len(field) > 1)
        reached = [x for trace in data for x, y in zip(trace["x"], trace["y"], strict=True) if y is not None]
        layout["xaxis"].update(ticks, range=[0, 1.03 * (max(reached, default=0) or 1)])
        layout["yaxis"]["tickformat"] = what.ticks
        layout["yaxis"]["range"] = _range(field, what, heights)
        if axis != "flops" and len(field) > 1:
            _mark_equal(layout, field, axis, scale)
        views.append(View(label, data, layout))
    return Figure(what.id, what.title, what.caption, views) if views else None


def _range(field: Sequence[Contender], what: Course, heights: list[float]) -> list[float] | None:
    if what.higher_is_better:
        return gain_range(heights)
    found = loss_range(heights)
    later = [what.of(record) for c in field for record in c.twin.eval[len(c.twin.eval) // 2 :]] if what.parts else []
    highest = max(filter(math.isfinite, later), default=-math.inf)
    return found if found is None or highest <= found[1] else [found[0], rounded(1.03 * highest) or found[1]]


def _course_traces(
    contender: Contender, what: Course, axis: str, scale: float, heights: list[float]
) -> list[dict[str, Any]]:
    """The training line and the evaluations; `heights` collects what the vertical range has to show."""
    colour, dash, name = colour_of(contender), dash_of(contender), plain(contender.label)
    traces: list[dict[str, Any]] = []
    hover = f"%{{y:{what.form}}} {what.unit}<br>step %{{customdata:,}}<extra>{name}"
    train, evals = ([(number(r, axis) * scale, what.of(r), r["step"]) for r in part] for part in
                    (contender.twin.train if what.training else (), contender.twin.eval))  # fmt: skip
    train = [point for point in train if math.isfinite(point[0])]
    evals = [point for point in evals if math.isfinite(point[0])]
    if any(math.isfinite(y) for _, y, _ in train):
        smoothed = smooth([y for _, y, _ in train])
        points = thin([(x, y, step) for (x, _, step), y in zip(train, smoothed, strict=True)])
        heights += [y for _, y, _ in points[len(points) // 20 :]]
        faint = bool(evals)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(points) > 1 else "markers",
                "name": name,
                "meta": contender.label,
                "legendgroup": str(contender.colour),
                "showlegend": not evals,
                "x": [rounded(x) for x, _, _ in points],
                "y": [rounded(y) for _, y, _ in points],
                "customdata": [step for _, _, step in points],
                "line": {"color": f"{colour}/0.4" if faint else colour, "width": 1.25 if faint else 2, "dash": dash},
                "hovertemplate": hover + ", training</extra>",
            }
        )
    if evals:
        points = thin(evals)
        heights += [y for _, y, _ in points[1:] or points]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(points) <= 60 else "lines",
                "name": name,
                "meta": contender.label,
                "legendgroup": str(contender.colour),
                "showlegend": True,
                "x": [rounded(x) for x, _, _ in points],
                "y": [rounded(y) for _, y, _ in points],
                "customdata": [step for _, _, step in points],
                "line": {"color": colour, "width": 2.25, "dash": dash},
                "marker": {"color": colour, "size": 6, "symbol": "diamond" if contender.dense else "circle"},
                "hovertemplate": hover + "</extra>",
            }
        )
    return traces


def _mark_equal(layout: dict[str, Any], field: Sequence[Contender], axis: str, scale: float) -> None:
    """A dotted line where the contenders are compared."""
    at = reading(field, "train_s" if axis == "train_s" else "step").at
    if at is None:
        return
    what = f"equal time, {say.seconds(at)}" if axis == "train_s" else f"equal steps, {at:,.0f}"
    at *= scale
    early = at < 0.7 * layout["xaxis"]["range"][1]  # the label goes where there is room, and no curve
    line = {"color": "@ink-3", "width": 1.25, "dash": "dot"}
    layout["shapes"] = [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}
    ]
    layout["annotations"] = [
        {
            "x": at, "y": 1, "yref": "paper", "yanchor": "top", "showarrow": False, "text": what,
            "xanchor": "left" if early else "right", "xshift": 5 if early else -5,
            "font": {"size": 12, "color": "@ink-3"},
        }
    ]  # fmt: skip
