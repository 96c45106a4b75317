"""Glob patterns over layer names: that each matches something, and what they leave dense."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from rarefy.nn.conv import check_group_blocks
from rarefy.pattern import unit_grid
from rarefy.plan.layers import Layer


def check_filters(
    globs: Mapping[str, Iterable[str]], keep_dense: Iterable[str], layers: Mapping[str, Layer], model: nn.Module
) -> None:
    """Refuse globs that match no layer, and warn of a `keep_dense` that keeps nothing dense.

    Args:
        globs: a plan's option -> its patterns.
    Raises:
        ValueError: a pattern matches no layer, or there is no layer.
    """
    if not layers:
        raise ValueError(
            "the model has no layer that rarefy could make sparse: no nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D or "
            "sparse layer of ours"
        )
    for option, patterns in globs.items():
        for pattern in patterns:
            if not fnmatch.filter(layers, pattern):
                raise ValueError(f"{option}: {pattern!r} matches no layer; {_some(layers)}")
    everything = [*layers, *(name for name, _ in model.named_modules())]
    for pattern in keep_dense:
        if not fnmatch.filter(everything, pattern):
            warnings.warn(
                f"keep_dense: {pattern!r} matches no layer, so it keeps nothing dense; {_some(layers)}", stacklevel=4
            )


def why_left_dense(layer: Layer, include: Iterable[str], keep_dense: Iterable[str], block: tuple[int, int]) -> str:
    """Why a layer is left dense before anything is timed; empty: it is not.

    Args:
        block: the unit shape it would have.
    """
    for pattern in keep_dense:
        if any(fnmatch.fnmatch(name, pattern) for name in _with_ancestors(layer.name)):
            return f"kept dense as asked (keep_dense {pattern!r})"
    if not any(fnmatch.fnmatch(layer.name, pattern) for pattern in include):
        return "not included (include " + ", ".join(map(repr, include)) + ")"
    if layer.why_dense or layer.adopted:
        return layer.why_dense
    try:
        unit_grid(layer.shape, block)
        check_group_blocks(layer.groups, layer.shape[0], block)
    except ValueError as error:
        return str(error)
    return "" if min(layer.shape) > 0 else "it has no weights"


def _with_ancestors(name: str) -> list[str]:
    """a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _some(layers: Iterable[str]) -> str:
    names = list(layers)
    return "there are: " + ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
