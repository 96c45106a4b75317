"""Methods of finding the pattern: each says how units are scored; the engine does everything else."""

from rarefy.methods.base import LayerView, Method, Needs, registered, unit_mean
from rarefy.methods.candidates import Candidates, Choice
from rarefy.methods.cht import CHT, CHTs
from rarefy.methods.rigl import RigL
from rarefy.methods.set import SET
from rarefy.methods.srigl import SRigL
from rarefy.methods.static import Static

__all__ = [
    "CHT",
    "SET",
    "CHTs",
    "Candidates",
    "Choice",
    "LayerView",
    "Method",
    "Needs",
    "RigL",
    "SRigL",
    "Static",
    "registered",
    "unit_mean",
]
