"""Small models of our own, to be read."""

from rarefy.models.generate import Generation, generate, timed_generate
from rarefy.models.gpt import GPT, GPTConfig
from rarefy.models.mlp import MLP, MLPConfig
from rarefy.models.resnet import ResNet, ResNetConfig
from rarefy.models.wrn import WRN, WRNConfig

__all__ = [
    "GPT",
    "MLP",
    "WRN",
    "GPTConfig",
    "Generation",
    "MLPConfig",
    "ResNet",
    "ResNetConfig",
    "WRNConfig",
    "generate",
    "timed_generate",
]
