"""What a layer costs: bytes and FLOPs by counting, milliseconds by timing on the spot or by a calibrated model."""

from rarefy.cost.cache import cache_path, cost_model, load_model, save_model
from rarefy.cost.calibration import calibrate
from rarefy.cost.convolution import Convolution
from rarefy.cost.counting import convolutions_per_layer, layer_bytes, layer_flops, tokens_per_layer, training_bytes
from rarefy.cost.holdout import check
from rarefy.cost.host import CALIBRATED_BLOCKS, conditions
from rarefy.cost.layers import dense_layer, in_precision, random_batch
from rarefy.cost.model import CostModel
from rarefy.cost.precision import PRECISIONS, Precision, dense_precisions, precision_now, working_in
from rarefy.cost.spot import LayerCost, break_even, measure, measure_dense, predict
from rarefy.cost.timing import LEAST_ROUNDS, Lap, LayerStep, interleaved, interleaved_ms, kernels_for
from rarefy.cost.work import Work, dense_work

__all__ = [
    "CALIBRATED_BLOCKS",
    "LEAST_ROUNDS",
    "PRECISIONS",
    "Convolution",
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
    "convolutions_per_layer",
    "cost_model",
    "dense_layer",
    "dense_precisions",
    "dense_work",
    "in_precision",
    "interleaved",
    "interleaved_ms",
    "kernels_for",
    "layer_bytes",
    "layer_flops",
    "load_model",
    "measure",
    "measure_dense",
    "precision_now",
    "predict",
    "random_batch",
    "save_model",
    "tokens_per_layer",
    "training_bytes",
    "working_in",
]
