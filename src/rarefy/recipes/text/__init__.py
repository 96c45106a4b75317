"""A small GPT on bytes, sparse from its first step, beside its dense twin: what `rarefy train text` does.

The two networks start from the same draw, see the same bytes at every step and take the same number of steps, a few in
turn, so that whatever disturbs the machine disturbs both.
"""

from rarefy.recipes.text.settings import TextSettings
from rarefy.recipes.text.task import TextTask, load_network

__all__ = ["TextSettings", "TextTask", "load_network"]
