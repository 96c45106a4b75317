"""Sparse modules."""

from rarefy.nn.linear import SparseLinear
from rarefy.nn.mlp import mlp

__all__ = ["SparseLinear", "mlp"]
