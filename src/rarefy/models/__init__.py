"""Small models of our own, to be read."""

from rarefy.models.generate import Generation, generate, timed_generate
from rarefy.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "Generation", "generate", "timed_generate"]
