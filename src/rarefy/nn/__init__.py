"""Sparse modules."""

from rarefy.nn.conv import SparseConv2d
from rarefy.nn.linear import SparseLinear
from rarefy.nn.low_rank import SparseLowRank
from rarefy.nn.mlp import gated_mlp, mlp

__all__ = ["SparseConv2d", "SparseLinear", "SparseLowRank", "gated_mlp", "mlp"]
