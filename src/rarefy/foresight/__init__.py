"""What to train in a given time: loss, time and memory of networks foreseen, and the best dense and sparse ones chosen.

shape     a network as numbers
law       the loss it will have after so many bytes; fitting makes the law from runs, records reads them
steps     the milliseconds of its step; timing measures the few steps that the model needs, kept keeps it
memory    the bytes of its step
choice    the best of a grid, dense and sparse
"""

from rarefy.foresight.choice import Candidate, Choice, Wish, choose
from rarefy.foresight.kept import load_steps, step_model
from rarefy.foresight.law import Law, Point, shipped_law
from rarefy.foresight.memory import step_bytes
from rarefy.foresight.shape import Shape
from rarefy.foresight.steps import StepModel

__all__ = [
    "Candidate",
    "Choice",
    "Law",
    "Point",
    "Shape",
    "StepModel",
    "Wish",
    "choose",
    "load_steps",
    "shipped_law",
    "step_bytes",
    "step_model",
]
