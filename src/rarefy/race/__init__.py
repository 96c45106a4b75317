"""Dense and sparse networks under one clock: who is how good when, and who wins.

A race is a comparison at equal time whose runs go on together, a slice each in turn, so that whatever disturbs the
machine disturbs all alike. Contenders, paces, runs and records are those of `rarefy.compare`; what is learned, what it
is judged by and who runs unless the user says are the task's (`rarefy.recipes.task`).

modes     in which precision, and compiled or not, each network is fastest here
heats     short races, to choose the finalists
course    the runs on their way together
verdict   who won, by how much, and when one side reached what the other ended with
"""

from rarefy.race.race import Outcome, Race, race

__all__ = ["Outcome", "Race", "race"]
