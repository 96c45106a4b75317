"""Sparse against dense on this machine: layers and whole training steps, timed in turn, beside whichever peers are
installed, and against what the machine can do at most.
"""

from rarefy.bench.peers import Peer, installed
from rarefy.bench.results import BreakEven, Check, Crossing, Results, Row, Spread, break_even
from rarefy.bench.settings import Settings
from rarefy.bench.timing import run

__all__ = [
    "BreakEven", "Check", "Crossing", "Peer", "Results", "Row", "Settings", "Spread", "break_even", "installed", "run",
]  # fmt: skip
