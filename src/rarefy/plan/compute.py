"""Above which density each layer computes dense: a plan's wish, settled once, when the layers are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from rarefy.cost import Convolution, CostModel, break_even, cost_model
from rarefy.nn import SparseConvolution, SparseLayer

DenseAbove = float | Literal["auto"] | None


def check_dense_above(value: DenseAbove) -> None:
    """Raises ValueError for what is not a `Plan.dense_above`."""
    if value is None or value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f'dense_above must be a density in [0, 1], "auto" or None, got {value!r}')


def thresholds(
    layers: Mapping[str, SparseLayer],
    dense_above: DenseAbove,
    tokens: Mapping[str, int],
    costs: Callable[[], CostModel] = cost_model,
    *,
    convolutions: Mapping[str, Convolution] | None = None,
) -> dict[str, float]:
    """Layer name -> the density above which it computes dense; layers that always compute sparse are left out.

    Args:
        tokens: rows of input a layer sees in a step.
        costs: asked under "auto" alone; a layer that the model does not know stays sparse.
        convolutions: what convolutions do in a step; one whose images are not known stays sparse under "auto".
    """
    if dense_above is None:
        return {}
    if dense_above != "auto":
        return dict.fromkeys(layers, float(dense_above))
    model, found, seen = costs(), {}, convolutions or {}
    for name, layer in layers.items():
        if isinstance(layer, SparseConvolution) and name not in seen:
            continue
        shape = (layer.out_features, layer.in_features)
        even = break_even(model, shape, layer.block, tokens[name], seen.get(name))
        if even is not None:
            found[name] = even
    return found
