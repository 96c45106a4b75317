"""Sparse modules, and the dense ones that stand between them."""

from rarefy.nn.activation import SquaredReLU
from rarefy.nn.conv import SparseConv1d, SparseConv2d, SparseConvolution
from rarefy.nn.layer import SparseLayer
from rarefy.nn.layer_norm import add_norm
from rarefy.nn.linear import SparseLinear
from rarefy.nn.low_rank import SparseLowRank
from rarefy.nn.mlp import gated_mlp, mlp
from rarefy.nn.norm import norm_relu, norm_relu_conv

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConvolution",
    "SparseLayer",
    "SparseLinear",
    "SparseLowRank",
    "SquaredReLU",
    "add_norm",
    "gated_mlp",
    "mlp",
    "norm_relu",
    "norm_relu_conv",
]
