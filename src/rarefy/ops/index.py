"""The index arguments that every op takes, in the order of the schema."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.ops.library import call, isas
from rarefy.pattern import Pattern


class Index(NamedTuple):
    """Units by row and by column. Columns and rows are uint16 where they fit, else int32; pointers are int32."""

    crow: Tensor
    cols: Tensor
    t_crow: Tensor
    t_rows: Tensor
    t_perm: Tensor
    block: list[int]

    @property
    def out_features(self) -> int:
        return (self.crow.shape[0] - 1) * self.block[0]

    @property
    def in_features(self) -> int:
        return (self.t_crow.shape[0] - 1) * self.block[1]

    @property
    def num_units(self) -> int:
        return self.cols.shape[0]

    @property
    def expands(self) -> bool:
        """Whether the units are listed by row only, which means: compute dense (`rarefy.ops.expanded`)."""
        return self.t_perm.shape[0] != self.cols.shape[0]

    @classmethod
    def of(cls, pattern: Pattern, *, by_column: bool = True) -> Index:
        """The index of a pattern, in the narrowest dtypes. Shares no memory with it.

        Args:
            by_column: False: without the list of units by column, for a layer that computes dense.
        """
        crow = pattern.crow_indices.clone()
        cols = pattern.col_indices.to(index_dtype(pattern.num_unit_rows, pattern.num_unit_cols), copy=True)
        if not by_column:
            t_crow = crow.new_zeros(pattern.num_unit_cols + 1)
            counts = torch.bincount(pattern.col_indices.long(), minlength=pattern.num_unit_cols)
            t_crow[1:] = torch.cumsum(counts, 0)
            return cls(crow, cols, t_crow, cols.new_empty(0), crow.new_empty(0), list(pattern.block))
        if crow.device.type == "cpu" and isas():
            return cls(crow, cols, *_counting_sort(crow, cols, pattern.num_unit_cols), list(pattern.block))
        t_crow, t_rows, t_perm = pattern.transposed()
        return cls(crow, cols, t_crow, t_rows.to(cols.dtype), t_perm, list(pattern.block))


def _counting_sort(crow: Tensor, cols: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Pattern.transposed` in linear time, which is what a rewire waits for."""
    t_crow, t_rows, t_perm = crow.new_empty(num_cols + 1), torch.empty_like(cols), crow.new_empty(cols.shape[0])
    arrays = [array.data_ptr() for array in (crow, cols, t_crow, t_rows, t_perm)]
    call("rarefy_transpose", crow.shape[0] - 1, num_cols, *arrays, cols.element_size())
    return t_crow, t_rows, t_perm


def index_dtype(num_unit_rows: int, num_unit_cols: int) -> torch.dtype:
    """uint16 where both row and column numbers fit, else int32: one width a layer keeps the kernels few."""
    return torch.uint16 if max(num_unit_rows, num_unit_cols) <= 65536 else torch.int32
