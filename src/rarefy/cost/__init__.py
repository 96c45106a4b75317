"""What a layer costs: bytes and FLOPs by counting, milliseconds by timing on the spot or by a calibrated model."""

from rarefy.cost.counting import layer_bytes, layer_flops, tokens_per_layer, training_bytes
from rarefy.cost.spot import LayerCost, measure, measure_dense
from rarefy.cost.timing import (
    LEAST_ROUNDS,
    Lap,
    LayerStep,
    dense_layer,
    interleaved,
    interleaved_ms,
    kernels_for,
    random_batch,
)

__all__ = [
    "LEAST_ROUNDS",
    "Lap",
    "LayerCost",
    "LayerStep",
    "dense_layer",
    "interleaved",
    "interleaved_ms",
    "kernels_for",
    "layer_bytes",
    "layer_flops",
    "measure",
    "measure_dense",
    "random_batch",
    "tokens_per_layer",
    "training_bytes",
]
