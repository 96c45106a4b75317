"""The settings of an image run: what the user may say, and how what was left open is filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rarefy.models import MLPConfig
from rarefy.plan import Plan
from rarefy.recipes.images.data import CLASSES
from rarefy.recipes.settings import RunSettings

DEFAULT_PLAN = Plan(density=0.02, keep_dense=("head",))


@dataclass(frozen=True, kw_only=True)
class ImageSettings(RunSettings):
    """Train an MLP to tell images apart, sparse from its first step."""

    default_plan: ClassVar[Plan] = DEFAULT_PLAN

    data: str | None = None
    """A folder in the layout of MNIST or Fashion-MNIST: four IDX files, plain, .gz or .xz."""

    plan: Plan = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's, 0.02."""

    hidden: tuple[int, ...] = (1000, 1000, 1000)
    """Features of each hidden layer."""

    batch: int = 128
    """Images a step."""

    shift: int = 0
    """Pixels that a training image is moved at most, at random; 0: none."""

    flip: bool = False
    """Mirror half of the training images."""

    lr: float = 1e-3
    """Peak learning rate of the sparse network, but for its sparse layers."""

    weight_decay: float = 0.01
    """Of weights; biases have none."""

    def __post_init__(self) -> None:
        self._at_least_one("batch")
        self._not_negative("shift")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        super().__post_init__()
        self.mlp(1)

    def mlp(self, inputs: int) -> MLPConfig:
        """The network's shape for images of so many pixels."""
        return MLPConfig(inputs=inputs, hidden=self.hidden, classes=CLASSES)

    @property
    def tokens_per_step(self) -> int:
        """Images that an optimizer step learns from."""
        return self.batch
