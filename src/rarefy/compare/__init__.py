"""Contenders x seeds under one rule of what is equal: runs that are kept, gone on with, and never made twice.

contenders  who competes: plan files, method names with settings, dense, small-dense
jobs        the runs, each known by a digest of all that defines it
pace        equal time or equal FLOPs become numbers of steps
rehearsal   what a step of each takes, all in turn
run         one run, from its last checkpoint to its record
schedule    all of them, one after the other or several at once
records     the small JSON file that is kept of a run
table       means and spread
"""

from rarefy.compare.comparison import Comparison, Outcome, compare
from rarefy.compare.contenders import Contender, parse_contenders
from rarefy.compare.pace import Equal
from rarefy.recipes.images import ImagesTask
from rarefy.recipes.task import Task
from rarefy.recipes.text import TextTask

__all__ = [
    "Comparison",
    "Contender",
    "Equal",
    "ImagesTask",
    "Outcome",
    "Task",
    "TextTask",
    "compare",
    "parse_contenders",
]
