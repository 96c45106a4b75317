"""What a layer costs: bytes and FLOPs by counting, milliseconds by timing on the spot or by a calibrated model."""

from rarefy.cost.cache import cache_path, cost_model, load_model, save_model
from rarefy.cost.calibration import calibrate
from rarefy.cost.counting import images_per_layer, layer_bytes, layer_flops, tokens_per_layer, training_bytes
from rarefy.cost.holdout import check
from rarefy.cost.host import CALIBRATED_BLOCKS, conditions
from rarefy.cost.model import CostModel
from rarefy.cost.precision import PRECISIONS, Precision, dense_precisions, precision_now, working_in
from rarefy.cost.spot import LayerCost, break_even, measure, measure_conv, measure_dense, predict
from rarefy.cost.terms import Work, dense_work
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
from rarefy.cost.trial import in_precision

__all__ = [
    "CALIBRATED_BLOCKS",
    "LEAST_ROUNDS",
    "PRECISIONS",
    "CostModel",
    "Lap",
    "LayerCost",
    "LayerStep",
    "Precision",
    "Work",
    "break_even",
    "cache_path",
    "calibrate",
    "check",
    "conditions",
    "cost_model",
    "dense_layer",
    "dense_precisions",
    "dense_work",
    "images_per_layer",
    "in_precision",
    "interleaved",
    "interleaved_ms",
    "kernels_for",
    "layer_bytes",
    "layer_flops",
    "load_model",
    "measure",
    "measure_conv",
    "measure_dense",
    "precision_now",
    "predict",
    "random_batch",
    "save_model",
    "tokens_per_layer",
    "training_bytes",
    "working_in",
]
