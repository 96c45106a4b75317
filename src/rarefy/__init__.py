"""rarefy: train neural networks sparse, from the first step."""

from rarefy import export
from rarefy.convert import sparsify
from rarefy.distributions import er, erk, uniform
from rarefy.files import load, load_into, save
from rarefy.growth import Exact, Momentum, NormProduct, SampledTokens, Signal
from rarefy.methods import (
    CHT,
    GMP,
    MEST,
    SET,
    Candidates,
    Choice,
    CHTs,
    GraNet,
    LayerView,
    Method,
    Needs,
    Redistribution,
    RigL,
    SRigL,
    Static,
    unit_mean,
)
from rarefy.nn import SparseConv1d, SparseConv2d, SparseLinear, SparseLowRank
from rarefy.optim import AdamW, param_groups
from rarefy.pattern import Pattern
from rarefy.plan import Explanation, Plan, pixelated_butterfly, sltrain
from rarefy.rewiring import Guard, GuardWarning, Rewirer
from rarefy.schedules import Constant, Cosine, Cubic, Linear, Schedule, Steps
from rarefy.supar import SuPar

__version__ = "0.1.0"

__all__ = [
    "CHT",
    "GMP",
    "MEST",
    "SET",
    "AdamW",
    "CHTs",
    "Candidates",
    "Choice",
    "Constant",
    "Cosine",
    "Cubic",
    "Exact",
    "Explanation",
    "GraNet",
    "Guard",
    "GuardWarning",
    "LayerView",
    "Linear",
    "Method",
    "Momentum",
    "Needs",
    "NormProduct",
    "Pattern",
    "Plan",
    "Redistribution",
    "Rewirer",
    "RigL",
    "SRigL",
    "SampledTokens",
    "Schedule",
    "Signal",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "SparseLowRank",
    "Static",
    "Steps",
    "SuPar",
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
