"""Methods of finding the pattern: each says how units are scored; the engine does everything else."""

from rarefy.methods.base import LayerView, Method, Needs, registered, unit_mean
from rarefy.methods.candidates import Candidates, Choice
from rarefy.methods.cht import CHT, CHTs
from rarefy.methods.gmp import GMP
from rarefy.methods.granet import GraNet
from rarefy.methods.mest import MEST
from rarefy.methods.redistribution import Redistribution
from rarefy.methods.rigl import RigL
from rarefy.methods.set import SET
from rarefy.methods.srigl import SRigL
from rarefy.methods.static import Static

__all__ = [
    "CHT",
    "GMP",
    "MEST",
    "SET",
    "CHTs",
    "Candidates",
    "Choice",
    "GraNet",
    "LayerView",
    "Method",
    "Needs",
    "Redistribution",
    "RigL",
    "SRigL",
    "Static",
    "registered",
    "unit_mean",
]
