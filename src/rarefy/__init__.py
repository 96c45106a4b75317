"""rarefy: train neural networks sparse, from the first step."""

from rarefy import export
from rarefy.convert import sparsify
from rarefy.distributions import er, erk, uniform
from rarefy.files import load, load_into, save
from rarefy.methods import SET, LayerView, Method, Needs, RigL, Static, unit_mean
from rarefy.nn import SparseLinear, SparseLowRank
from rarefy.optim import AdamW, param_groups
from rarefy.pattern import Pattern
from rarefy.plan import Explanation, Plan, pixelated_butterfly, sltrain
from rarefy.rewiring import Rewirer
from rarefy.schedules import Constant, Cosine, Linear, Schedule

__version__ = "0.1.0"

__all__ = [
    "SET",
    "AdamW",
    "Constant",
    "Cosine",
    "Explanation",
    "LayerView",
    "Linear",
    "Method",
    "Needs",
    "Pattern",
    "Plan",
    "Rewirer",
    "RigL",
    "Schedule",
    "SparseLinear",
    "SparseLowRank",
    "Static",
    "er",
    "erk",
    "export",
    "load",
    "load_into",
    "param_groups",
    "pixelated_butterfly",
    "save",
    "sltrain",
    "sparsify",
    "uniform",
    "unit_mean",
]
