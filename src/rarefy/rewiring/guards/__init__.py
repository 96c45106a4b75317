"""Guard rails: what can go wrong while a pattern is found, each with a name, a condition, and what to change.

A guard is asked at one or more moments: when the length of the run is known, of every layer at the start and after each
of its rewires, of every neuron between two layers, of the loss. It answers with a message or None. `Watch` asks them
all and keeps what they said, once a guard and layer. Thresholds are fields: a guard of other thresholds is one line.
"""

from rarefy.rewiring.guards.base import Guard, LossView, NeuronView, PatternView, RunView
from rarefy.rewiring.guards.layers import Collapse, DeadColumns, DeadNeurons, DeadRows, Newborns
from rarefy.rewiring.guards.losses import BEFORE, LossSpike
from rarefy.rewiring.guards.run import Exploration, FrozenEnd, expected_tried
from rarefy.rewiring.guards.watch import GuardWarning, Watch, guard_line

SKIPPED = "skipped rewire"
"""What the engine itself tells of rewires that it left out, as values or scores were not finite (rule 8.3)."""


GUARDS: tuple[Guard, ...] = (
    Exploration(),
    FrozenEnd(),
    DeadRows(),
    DeadColumns(),
    DeadNeurons(),
    Collapse(),
    Newborns(),
    LossSpike(),
)
"""Those that a `Rewirer` has unless told otherwise."""

__all__ = [
    "BEFORE",
    "GUARDS",
    "SKIPPED",
    "Collapse",
    "DeadColumns",
    "DeadNeurons",
    "DeadRows",
    "Exploration",
    "FrozenEnd",
    "Guard",
    "GuardWarning",
    "LossSpike",
    "LossView",
    "NeuronView",
    "Newborns",
    "PatternView",
    "RunView",
    "Watch",
    "expected_tried",
    "guard_line",
]
