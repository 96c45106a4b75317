"""The engine that rewires: exact counts, ties, state, ranks, schedules and resume live here, once."""

from rarefy.rewiring.compute import choose_compute
from rarefy.rewiring.engine import Rewirer

__all__ = ["Rewirer", "choose_compute"]
