"""Sparse modules."""

from rarefy.nn.linear import SparseLinear

__all__ = ["SparseLinear"]
