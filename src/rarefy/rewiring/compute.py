"""How a layer multiplies follows its density: a pure function of both, so that a resumed run decides alike."""

from __future__ import annotations

from rarefy.nn import SparseLayer


def choose_compute(layer: SparseLayer, dense_above: float | None) -> bool:
    """Let the layer compute dense if its density is above `dense_above`, else sparse; whether that changed it.

    Args:
        dense_above: None: always sparse. To be called between optimizer steps, after each change of the density.
    """
    before = layer.compute
    layer.set_compute("dense" if dense_above is not None and layer.density > dense_above else "sparse")
    return layer.compute != before
