"""The settings of an image run: what the user may say, and how what was left open is filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rarefy.models import MLPConfig, ResNetConfig, WRNConfig
from rarefy.plan import Plan
from rarefy.recipes.images.data import ImageShape
from rarefy.recipes.settings import RunSettings

DEFAULT_PLAN = Plan(density=0.02, keep_dense=("head",))


@dataclass(frozen=True, kw_only=True)
class ImageSettings(RunSettings):
    """Train a network to tell images apart, sparse from its first step."""

    default_plan: ClassVar[Plan] = DEFAULT_PLAN

    data: str | None = None
    """A folder: MNIST or Fashion-MNIST (four IDX files, plain, .gz or .xz), CIFAR-10 in its binary version, or pictures
    as train/CLASS/* and test/CLASS/*."""

    plan: Plan = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's, 0.02."""

    model: Literal["mlp", "wrn", "resnet"] = "mlp"
    """Plain layers, a wide residual network (pre-activation), or a ResNet with a 3x3 stem."""

    hidden: tuple[int, ...] = (1000, 1000, 1000)
    """Features of each hidden layer of an mlp."""

    depth: int = 22
    """Of a wrn: 6 n + 4, for n blocks in each group."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Of each stage of a resnet; the default is ResNet-18's."""

    width: float = 1.0
    """Of a wrn or resnet, in channels, times 16, 32 and 64, or times 64, 128, ... ."""

    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, in training."""

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
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing:g}")
        super().__post_init__()
        self.network(ImageShape(1, 1, 1))

    def network(self, image: ImageShape) -> MLPConfig | WRNConfig | ResNetConfig:
        """The network's shape for such images."""
        if self.model == "mlp":
            return MLPConfig(inputs=image.numbers, hidden=self.hidden, classes=image.classes)
        if self.model == "wrn":
            return WRNConfig(depth=self.depth, width=self.width, channels=image.channels, classes=image.classes)
        width = max(1, round(64 * self.width))
        return ResNetConfig(blocks=self.blocks, width=width, channels=image.channels, classes=image.classes)

    @property
    def tokens_per_step(self) -> int:
        """Images that an optimizer step learns from."""
        return self.batch
