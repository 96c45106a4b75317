"""Small models of our own, to be read."""

from rarefy.models.generate import Generation, generate, timed_generate
from rarefy.models.gpt import GPT, GPTConfig
from rarefy.models.mlp import MLP, MLPConfig

__all__ = ["GPT", "MLP", "GPTConfig", "Generation", "MLPConfig", "generate", "timed_generate"]
