"""rarefy: train neural networks sparse, from the first step."""

from rarefy import export
from rarefy.convert import sparsify
from rarefy.distributions import er, erk, uniform
from rarefy.files import load, load_into, save
from rarefy.methods import SET, Candidates, Choice, LayerView, Method, Needs, RigL, Static, unit_mean
from rarefy.nn import SparseLinear
from rarefy.optim import AdamW, param_groups
from rarefy.pattern import Pattern
from rarefy.plan import Explanation, Plan
from rarefy.rewiring import Guard, GuardWarning, Rewirer
from rarefy.schedules import Constant, Cosine, Linear, Schedule
from rarefy.supar import SuPar

__version__ = "0.1.0"

__all__ = [
    "SET",
    "AdamW",
    "Candidates",
    "Choice",
    "Constant",
    "Cosine",
    "Explanation",
    "Guard",
    "GuardWarning",
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
    "Static",
    "SuPar",
    "er",
    "erk",
    "export",
    "load",
    "load_into",
    "param_groups",
    "save",
    "sparsify",
    "uniform",
    "unit_mean",
]
