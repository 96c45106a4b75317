"""Small models of our own, to be read."""

from rarefy.models.gpt import GPT, GPTConfig, generate

__all__ = ["GPT", "GPTConfig", "generate"]
