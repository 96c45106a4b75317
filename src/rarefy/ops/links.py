"""Scores of links by the kernels of csrc/links.h, as `rarefy.methods.topology` defines them and computes them plainly.

S unit rows, L unit columns of an unstructured pattern on the CPU.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy.ops.backend import runs_kernels
from rarefy.ops.index import Index
from rarefy.ops.library import call
from rarefy.ops.memory import empty
from rarefy.ops.native import c_pattern, why_not


def available(index: Index) -> bool:
    """Whether the kernels run here."""
    return runs_kernels(why_not(torch.float32, index.crow.device, index.block))


def link_pairs(index: Index, inside: bool) -> Tensor:
    """(S, S) float32: what row j counts for, seen from row i, at [j, i].

    Args:
        inside: whether links to common neighbours count for a link (CH2).
    """
    pairs = empty(index.out_features, index.out_features)
    call("rarefy_link_pairs", ctypes.byref(c_pattern(index)), inside, pairs.data_ptr(), torch.get_num_threads())
    return pairs


def link_scores(index: Index, inside: bool, pairs: Tensor, first: int, last: int) -> Tensor:
    """(last - first, S) float32 scores of the links of columns [first, last), rounded to 17 bits."""
    scores = empty(last - first, index.out_features)
    arguments = (pairs.data_ptr(), first, last, scores.data_ptr(), torch.get_num_threads())
    call("rarefy_link_scores", ctypes.byref(c_pattern(index)), inside, *arguments)
    return scores
