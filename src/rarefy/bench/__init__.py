"""Sparse against dense on this machine: layer by layer, timed in turn, beside whichever peers are installed."""

from rarefy.bench.peers import Peer, installed
from rarefy.bench.results import BreakEven, Check, Results, Row, Spread, break_even
from rarefy.bench.timing import run

__all__ = ["BreakEven", "Check", "Peer", "Results", "Row", "Spread", "break_even", "installed", "run"]
