"""Dense and sparse networks under one clock: who reaches which loss when, and who wins.

A race is a comparison at equal time whose runs go on together, a slice each in turn, so that whatever disturbs the
machine disturbs all alike. Contenders, paces, runs and records are those of `rarefy.compare`.

field     who runs, unless the user says: a ladder of dense networks, and as many sparse ones
modes     in which precision, and compiled or not, each network is fastest here
heats     short races, to choose the finalists
course    the runs on their way together
verdict   who won, by how much, and when one side reached what the other ended with
"""

from rarefy.race.race import Outcome, Race, race

__all__ = ["Outcome", "Race", "race"]
