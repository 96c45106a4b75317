"""Turning a wish (density, blocks, method) into one decision a layer."""

from rarefy.plan.compute import thresholds
from rarefy.plan.decision import Decision
from rarefy.plan.explanation import Explanation
from rarefy.plan.layers import Layer, find_layers, is_conv1d
from rarefy.plan.plan import Plan
from rarefy.plan.presets import pixelated_butterfly, sltrain
from rarefy.plan.times import ASSUMED_TOKENS

__all__ = [
    "ASSUMED_TOKENS",
    "Decision",
    "Explanation",
    "Layer",
    "Plan",
    "find_layers",
    "is_conv1d",
    "pixelated_butterfly",
    "sltrain",
    "thresholds",
]
