"""What figures are made of: plain plotly, with layouts, colours and names alike.

Colours are names ("@c0", "@line", "@c1/0.2" with an opacity) that the page looks up in its style sheet, so that one
figure serves light, dark and paper. Text that a run brought along (layer names, reasons, labels) goes through `plain`:
plotly reads tags in text.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rarefy.report.compare import Contender

PALETTE = 8
"""Colours --c0 to --c7 in the style sheet; contenders beyond that begin again, with another dash."""

Point = TypeVar("Point")

MAX_POINTS = 1500
"""Points of one drawn curve: more than a screen has columns."""


@dataclass(frozen=True)
class View:
    """One state of a figure: what its tab says and what plotly draws."""

    label: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A plot with its title, what to look for in it, and one or more views to switch between."""

    id: str
    title: str
    caption: str
    views: list[View]
    wide: bool = True
    """Whether it needs the full width of the page."""


def plain(text: object, limit: int | None = None) -> str:
    """Text for plotly: tags made harmless, the front of a long name cut (its end tells layers apart)."""
    text = " ".join(str(text).split())
    if limit is not None and len(text) > limit:
        text = "…" + text[1 - limit :]
    return html.escape(text, quote=False)


def plot_layout(height: int, *, x: str, y: str, legend: bool = False) -> dict[str, Any]:
    axis = {
        "gridcolor": "@line", "linecolor": "@line", "zeroline": False, "ticks": "", "automargin": True,
        "tickfont": {"size": 12, "color": "@ink-2"},
    }  # fmt: skip

    def titled(text: str) -> dict[str, Any]:
        return (
            {**axis, "title": {"text": text, "standoff": 10, "font": {"size": 12, "color": "@ink-2"}}}
            if text
            else {**axis}
        )

    return {
        "height": height,
        "margin": {"l": 10, "r": 14, "t": 10, "b": 10},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@raised", "bordercolor": "@line", "align": "left", "font": {"size": 12, "color": "@ink"},
        },
        "showlegend": legend,
        "xaxis": titled(x),
        "yaxis": titled(y),
    }  # fmt: skip


def name_axis(axis: dict[str, Any], names: Sequence[str], *, reverse: bool, every: int = 1) -> None:
    """Names on an axis of places 0, 1, 2, ...: names as data would be taken for numbers or merged when equal."""
    axis["tickvals"] = list(range(0, len(names), max(1, every)))
    axis["ticktext"] = [plain(name, 26) + "\u2002" for name in names[:: max(1, every)]]
    axis["showgrid"] = False
    axis["range"] = [len(names) - 0.5, -0.5] if reverse else [-0.5, len(names) - 0.5]


def gain_range(heights: Sequence[float]) -> list[float] | None:
    """From where nearly all values lie up to the best: the first evaluations would flatten everything else."""
    ordered = sorted(y for y in heights if math.isfinite(y))
    if not ordered:
        return None
    low, high = ordered[int(0.1 * (len(ordered) - 1))], ordered[-1]
    span = max(high - low, 0.005)
    return [max(0.0, low - 0.15 * span), min(1.0, high + 0.1 * span)]


def loss_range(heights: list[float]) -> list[float] | None:
    """From the best value up to where nearly all values lie: the first steps would flatten everything else."""
    finite = sorted(y for y in heights if math.isfinite(y))
    if not finite:
        return None
    low, high = finite[0], finite[int(0.95 * (len(finite) - 1))]
    span = max(high - low, 0.05)
    return [rounded(low - 0.08 * span) or 0.0, rounded(high + 0.15 * span) or 1.0]


def colour_of(contender: Contender) -> str:
    return f"@c{contender.colour % PALETTE}"


def dash_of(contender: Contender) -> str:
    return ("solid", "dash", "dot")[contender.colour // PALETTE % 3]


def rounded(value: float) -> float | None:
    """Six significant digits are more than a screen shows; JSON has no NaN, a gap is null."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS of them, evenly, the last one kept."""
    every = math.ceil(len(points) / MAX_POINTS)
    return points if every <= 1 else points[:-1:every] + points[-1:]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over a fortieth of the curve, narrower towards the ends; a NaN stays one."""
    half = max(1, len(values) // 80)
    smoothed = []
    for place, value in enumerate(values):
        reach = min(half, place, len(values) - 1 - place)
        window = [v for v in values[place - reach : place + reach + 1] if math.isfinite(v)]
        smoothed.append(statistics.fmean(window) if math.isfinite(value) else math.nan)
    return smoothed
