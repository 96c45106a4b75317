"""The engine that rewires: exact counts, ties, state, ranks, schedules and resume live here, once."""

from rarefy.rewiring.compute import choose_compute
from rarefy.rewiring.engine import Rewirer
from rarefy.rewiring.guards import GUARDS, Guard, GuardWarning

__all__ = ["GUARDS", "Guard", "GuardWarning", "Rewirer", "choose_compute"]
