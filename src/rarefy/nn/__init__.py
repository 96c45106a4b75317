"""Sparse modules."""

from rarefy.nn.linear import SparseLinear
from rarefy.nn.mlp import gated_mlp, mlp

__all__ = ["SparseLinear", "gated_mlp", "mlp"]
