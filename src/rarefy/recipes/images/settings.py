"""The settings of an image run: what the user may say, and how what was left open is filled in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from rarefy.models import MLPConfig, ResNetConfig, WRNConfig
from rarefy.models.images import per_stage
from rarefy.plan import Plan
from rarefy.recipes.images.data import ImageShape
from rarefy.recipes.settings import RunSettings

DEFAULT_PLAN = Plan(density=0.02, keep_dense=("head",))

CONVOLUTIONAL: dict[str, Any] = {"density": 0.1, "method": "set"}
"""What the built-in plan says of a wrn or resnet: its layers are much smaller than an mlp's, and growth by gradient
needs dense gradients of them, which take longer than all else in a step."""

COLOUR_SHIFT = 8
"""Colour images are moved by up to one part in so many of their height, unless told otherwise."""

Model = Literal["mlp", "wrn", "resnet"]


@dataclass(frozen=True, kw_only=True)
class ImageSettings(RunSettings):
    """Train a network to tell images apart, sparse from its first step, beside its dense twin."""

    default_plan: ClassVar[Plan] = DEFAULT_PLAN

    data: str | None = None
    """A folder: MNIST or Fashion-MNIST (four IDX files, plain, .gz or .xz), CIFAR-10 in its binary version, or pictures
    as train/CLASS/* and test/CLASS/*; or hf:NAME, a data set of the Hugging Face hub."""

    image_column: str | None = None
    """With hf:NAME, the column of images. Without it: the only one, or the one called image or img."""

    label_column: str | None = None
    """With hf:NAME, the column of labels. Without it: the only one, or the one called label or labels."""

    plan: Plan = DEFAULT_PLAN
    """A plan file (YAML): density, method, blocks, which layers. The options below override it."""

    density: float | None = None
    """Share of the weights that exist, in (0, 1]. Without it: the plan's; without one 0.02, and 0.1 of a wrn or resnet.
    """

    method: str | None = None
    """How the pattern is found: rigl, set or static, or another method's class name. Without it: the plan's; without
    one rigl, and set in a wrn or resnet."""

    model: Model | None = None
    """Plain layers, a wide residual network (pre-activation), or a ResNet with a 3x3 stem. Without it: wrn for colour
    images, mlp for grey ones."""

    hidden: tuple[int, ...] = (1000, 1000, 1000)
    """Features of each hidden layer of an mlp."""

    depth: int = 22
    """Of a wrn: 6 n + 4, for n blocks in each group."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Of each stage of a resnet; the default is ResNet-18's."""

    width: float | tuple[float, ...] = 1.0
    """Of a wrn or resnet, in channels, times 16, 32 and 64, or times 64, 128, ...; several numbers: of each group or
    stage."""

    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, in training."""

    batch: int = 128
    """Images a step."""

    shift: int | None = None
    """Pixels that a training image is moved at most, at random; 0: none. Without it: an eighth of the height of colour
    images, none of grey ones."""

    flip: bool | None = None
    """Mirror half of the training images. Without it: colour images."""

    eval_images: int | None = None
    """Validation images looked at at each evaluation, the same each time, drawn at random. Without it: all."""

    lr: float = 1e-3
    """Peak learning rate of the sparse network, but for its sparse layers."""

    weight_decay: float = 0.01
    """Of weights; biases have none."""

    def __post_init__(self) -> None:
        self._at_least_one("batch", "eval_images")
        self._not_negative("shift")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if isinstance(self.width, list | tuple):  # one number on the command line is a tuple of it
            object.__setattr__(self, "width", tuple(self.width) if len(self.width) > 1 else float(*self.width))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing:g}")
        super().__post_init__()
        self.network(ImageShape(1, 1, 1))

    def folded_plan(self) -> Plan:
        """See `RunSettings`; of convolutional networks the built-in plan says something else."""
        if self.plan == DEFAULT_PLAN and self.model in ("wrn", "resnet"):
            open_ = {name: value for name, value in CONVOLUTIONAL.items() if getattr(self, name) is None}
            if open_:
                return dataclasses.replace(self, **open_).folded_plan()
        return super().folded_plan()

    def for_images(self, image: ImageShape) -> Self:
        """With what follows from the images filled in.

        Raises:
            ValueError: the images are too small for the shift, or for the network.
        """
        colour = image.channels == 3
        filled = dataclasses.replace(
            self,
            model=self._model(image),
            shift=image.height // COLOUR_SHIFT * colour if self.shift is None else self.shift,
            flip=colour if self.flip is None else self.flip,
        )
        filled._check_fits(image)
        return filled

    def _model(self, image: ImageShape) -> Model:
        return self.model if self.model is not None else "wrn" if image.channels == 3 else "mlp"

    def _check_fits(self, image: ImageShape) -> None:
        side = f"{image.width} x {image.height} pixels"
        if self.shift is not None and self.shift and self.shift >= min(image.width, image.height):
            raise ValueError(
                f"shift must be less than the images' {side}, or nothing is left of some; got {self.shift}"
            )
        halvings = 2 if self.model == "wrn" else len(self.blocks) - 1
        pixels = -(-image.width // 2**halvings) * -(-image.height // 2**halvings)
        if self.model != "mlp" and self.batch * pixels < 2:
            raise ValueError(
                f"images of {side} leave the last layers of a {self.model} a single number per channel in batches of "
                f"{self.batch}, and batch norm needs two: give a larger --batch, larger images, or --model mlp"
            )

    def network(self, image: ImageShape) -> MLPConfig | WRNConfig | ResNetConfig:
        """The network's shape for such images."""
        model = self._model(image)
        if model == "mlp":
            return MLPConfig(inputs=image.numbers, hidden=self.hidden, classes=image.classes)
        if model == "wrn":
            return WRNConfig(depth=self.depth, width=self.width, channels=image.channels, classes=image.classes)
        widths = per_stage(self.width, len(self.blocks))  # raises
        if isinstance(self.width, tuple):
            width = tuple(max(1, round((64 << at) * times)) for at, times in enumerate(widths))
        else:
            width = max(1, round(64 * self.width))
        return ResNetConfig(blocks=self.blocks, width=width, channels=image.channels, classes=image.classes)

    def scaled(self, scale: float) -> Self:
        """With all hidden layers, or numbers of channels, times `scale`."""
        if self.model == "mlp":
            return dataclasses.replace(self, hidden=tuple(max(1, round(size * scale)) for size in self.hidden))
        if isinstance(self.width, tuple):
            return dataclasses.replace(self, width=tuple(times * scale for times in self.width))
        return dataclasses.replace(self, width=self.width * scale)

    @property
    def tokens_per_step(self) -> int:
        """Images that an optimizer step learns from."""
        return self.batch
