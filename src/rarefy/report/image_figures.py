"""What only runs of images have to show: confusions, mistakes, filters, and where the connections went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.report import numbers as say
from rarefy.report.compare import Contender
from rarefy.report.found import Connections, Found, FoundTwin, Layer
from rarefy.report.plots import Figure, View, colour_of, name_axis, plain, plot_layout, rounded
from rarefy.report.png import data_uri

COUNTED_CLASSES = 12
"""With more classes, a confusion matrix has its counts on hover alone."""

SHOWN_MISTAKES = 16
"""Of each network."""

KERNELS_A_ROW = 6
"""Of the small squares that show where in their kernels convolutions have weights."""


@dataclass(frozen=True)
class Picture:
    """A small image of the page."""

    uri: str
    title: str
    """On hover, and for those who do not see it."""
    lines: tuple[str, ...] = ()
    """Under it."""


@dataclass(frozen=True)
class Strip:
    """Pictures of a network."""

    contender: Contender
    pictures: list[Picture]


def image_figures(field: Sequence[Contender]) -> list[Figure]:
    """Every figure that the data has something for, in reading order."""
    drawn = (confusion(field), densities(field), taps(field), inputs(field))
    return [figure for figure in drawn if figure is not None]


def _found(field: Sequence[Contender]) -> Iterator[tuple[Contender, Found, FoundTwin]]:
    for contender in field:
        found = contender.run.found
        if found is not None and contender.twin.name in found.twins:
            yield contender, found, found.twins[contender.twin.name]


# Pictures


def mistakes(field: Sequence[Contender]) -> list[Strip]:
    """Images that each network is wrong about and surest of."""
    strips = []
    for contender, found, twin in _found(field):
        pictures = []
        for one in twin.wrong[:SHOWN_MISTAKES]:
            true, predicted = found.names[one.true], found.names[one.predicted]
            title = f"image {one.image:,}: {true}, taken for {predicted} ({say.percent(one.confidence)} sure)"
            pictures.append(Picture(data_uri(one.raw, _image_shape(one.shape)), title, (true, predicted)))
        if pictures:
            strips.append(Strip(contender, pictures))
    return strips


def filters(field: Sequence[Contender]) -> list[Strip]:
    """The first convolution of each network, a picture a filter."""
    strips = []
    for contender, _, twin in _found(field):
        layer = twin.first_layer
        if layer is None or len(layer.shape) != 4:
            continue
        count, *rest = layer.shape
        size = math.prod(rest)
        pictures = [
            Picture(data_uri(layer.raw[at * size : (at + 1) * size], _image_shape(rest)), f"{layer.name}, filter {at}")
            for at in range(count)
        ]
        strips.append(Strip(contender, pictures))
    return strips


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


# Plots


def confusion(field: Sequence[Contender]) -> Figure | None:
    """What each network takes each class for."""
    views = [_confusion_view(contender, found, twin) for contender, found, twin in _found(field)]
    if not views:
        return None
    count = next(found.images for _, found, _ in _found(field))
    caption = (
        f"All {count:,} validation images at the last step: a row is a true class, a column what its images were taken "
        "for. Colours go by the square root of the share of the row, so that rare mistakes show."
    )
    return Figure("confusion", "Confusion", caption, views)


def _confusion_view(contender: Contender, found: Found, twin: FoundTwin) -> View:
    names, counts = found.names, twin.confusion
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    hover = [
        [
            f"<b>{plain(true)}</b> taken for <b>{plain(predicted)}</b><br>"
            f"{counts[i][j]:,} of {sum(counts[i]):,}, {say.percent(shares[i][j])}"
            for j, predicted in enumerate(names)
        ]
        for i, true in enumerate(names)
    ]
    cells: dict[str, Any] = {
        "type": "heatmap",
        "x": list(range(len(names))),
        "y": list(range(len(names))),
        "z": [[rounded(math.sqrt(share)) for share in row] for row in shares],
        "zmin": 0,
        "zmax": 1,
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
        "colorscale": [[0, "@low"], [1, colour_of(contender)]],
    }
    if len(names) <= COUNTED_CLASSES:
        cells |= {"text": [[f"{n:,}" if n else "" for n in row] for row in counts], "texttemplate": "%{text}"}
    layout = plot_layout(min(760, 110 + 34 * len(names)), x="taken for", y="")
    name_axis(layout["xaxis"], names, reverse=False, every=math.ceil(len(names) / 32))
    name_axis(layout["yaxis"], names, reverse=True, every=math.ceil(len(names) / 32))
    return View(contender.label, [cells], layout)


def densities(field: Sequence[Contender]) -> Figure | None:
    """Density of each sparse layer at the start and at the end."""
    views = []
    for contender, _, twin in _found(field):
        if twin.layers and twin.start is not None:
            views.append(_density_view(contender, twin, twin.start))
    if not views:
        return None
    caption = (
        "Density of each sparse layer before the first step and after the last. They differ where the density moves, "
        "or where units wander between layers."
    )
    return Figure("connections", "Density, at the start and at the end", caption, views, wide=False)


def _density_view(contender: Contender, twin: FoundTwin, start: Connections) -> View:
    names = [layer.name for layer in twin.layers]
    before = {layer.name: layer.density for layer in start.layers}
    first, last = [before.get(name, math.nan) for name in names], [layer.density for layer in twin.layers]
    data = [
        {
            "type": "scatter", "mode": "markers", "name": when, "meta": when,
            "x": [rounded(value) for value in values], "y": list(range(len(names))),
            "customdata": [f"<b>{plain(name)}</b><br>{when} {say.percent(value)}" for name, value in
                           zip(names, values, strict=True)],
            "hovertemplate": "%{customdata}<extra></extra>",
            "marker": {"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2, "color": colour}},
        }
        for when, values, symbol, colour in (
            ("at the start", first, "circle-open", "@ink-3"), ("at the end", last, "line-ns", colour_of(contender)),
        )
    ]  # fmt: skip
    layout = plot_layout(min(640, 70 + 22 * len(names)), x="", y="", legend=True)
    highest = max([value for value in (*first, *last) if math.isfinite(value)], default=1.0)
    layout["xaxis"].update(tickformat=".2~%", range=[0, 1.1 * highest])
    name_axis(layout["yaxis"], names, reverse=True, every=math.ceil(len(names) / 28))
    return View(contender.label, data, layout)


def taps(field: Sequence[Contender]) -> Figure | None:
    """Weights at each place of the kernels, a square a layer."""
    drawn = []
    for contender, _, twin in _found(field):
        for when, layers in (("at the end", twin.layers), ("at the start", twin.start.layers if twin.start else [])):
            kernels = [layer for layer in layers if layer.taps]
            if kernels:
                drawn.append((contender, when, kernels))
    if not drawn:
        return None
    one = len({contender for contender, _, _ in drawn}) == 1
    views = [
        _taps_view(contender, kernels, when.capitalize() if one else f"{contender.label}, {when}")
        for contender, when, kernels in drawn
    ]
    caption = (
        "Where in their kernels the convolutions have weights, a square a layer in the order of the network: the "
        "number at each place over that of an even spread. Above 1, rewiring prefers the place."
    )
    return Figure("taps", "Kernels", caption, views)


def _taps_view(contender: Contender, kernels: Sequence[Layer], label: str) -> View:
    """One heatmap for all layers, with a cell between two."""
    sizes = [(len(layer.taps or []), len((layer.taps or [[]])[0])) for layer in kernels]
    tall, broad = max(h for h, _ in sizes) + 1, max(w for _, w in sizes) + 1
    rows = math.ceil(len(kernels) / KERNELS_A_ROW) * tall
    columns = min(len(kernels), KERNELS_A_ROW) * broad
    z: list[list[float | None]] = [[None] * columns for _ in range(rows)]
    hover = [[""] * columns for _ in range(rows)]
    titles = []
    for place, (layer, (h, w)) in enumerate(zip(kernels, sizes, strict=True)):
        top, left = place // KERNELS_A_ROW * tall + 1, place % KERNELS_A_ROW * broad
        counts = layer.taps or []
        even = sum(map(sum, counts)) / (h * w)
        titles.append({
            "x": left + (w - 1) / 2, "y": top - 1, "text": plain(layer.name, 20), "showarrow": False,
            "font": {"size": 11, "color": "@ink-2"},
        })  # fmt: skip
        for i in range(h):
            for j, count in enumerate(counts[i]):
                z[top + i][left + j] = rounded(count / even) if even else 0.0
                hover[top + i][left + j] = (
                    f"<b>{plain(layer.name)}</b><br>row {i + 1}, column {j + 1}: {count:,} weights, "
                    f"{say.times(count / even if even else 0.0)} of even"
                )
    cells = {
        "type": "heatmap", "z": z, "customdata": hover, "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False, "xgap": 1, "ygap": 1, "zmin": 0, "zmax": 2,
        "colorscale": [[0, "@low"], [1, colour_of(contender)]],
        "colorbar": _bar(".1f"),
    }  # fmt: skip
    layout = plot_layout(40 + 26 * rows, x="", y="")
    for axis in ("xaxis", "yaxis"):
        layout[axis].update(showgrid=False, showticklabels=False)
    layout["yaxis"]["range"] = [rows - 0.5, -0.5]
    layout["annotations"] = titles
    return View(label, [cells], layout)


def inputs(field: Sequence[Contender]) -> Figure | None:
    """How often the first layer of an mlp reads each pixel, as an image."""
    drawn = []
    for contender, _, twin in _found(field):
        for when, counts in (("at the end", twin.inputs), ("at the start", twin.start.inputs if twin.start else None)):
            if counts:
                drawn.append((contender, when, counts))
    if not drawn:
        return None
    one = len({contender for contender, _, _ in drawn}) == 1
    most = max(max(map(max, counts)) for _, _, counts in drawn)
    views = [
        _inputs_view(contender, counts, most, when.capitalize() if one else f"{contender.label}, {when}")
        for contender, when, counts in drawn
    ]
    caption = (
        "How many weights of the first layer read each pixel. At the start they are spread at random; where rewiring "
        "works, they gather where the images differ."
    )
    return Figure("inputs", "What the first layer looks at", caption, views, wide=False)


def _inputs_view(contender: Contender, counts: list[list[int]], most: int, label: str) -> View:
    cells = {
        "type": "heatmap", "z": counts, "zmin": 0, "zmax": most,
        "hovertemplate": "%{z:,} weights read row %{y}, column %{x}<extra></extra>",
        "colorscale": [[0, "@low"], [1, colour_of(contender)]],
        "colorbar": _bar(""),
    }  # fmt: skip
    layout = plot_layout(380, x="", y="")
    for axis in ("xaxis", "yaxis"):
        layout[axis].update(showgrid=False, showticklabels=False, constrain="domain")
    layout["yaxis"].update(autorange="reversed", scaleanchor="x")
    return View(label, [cells], layout)


def _bar(form: str) -> dict[str, Any]:
    return {
        "thickness": 10, "outlinewidth": 0, "nticks": 5, "len": 1, "xpad": 6, "tickformat": form,
        "tickfont": {"size": 11, "color": "@ink-2"},
    }  # fmt: skip
