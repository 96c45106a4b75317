"""A run's network, to be used: pictures in, names of classes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.recipes.images.batches import scaled
from rarefy.recipes.images.cifar import read_picture
from rarefy.recipes.images.data import ImageShape
from rarefy.recipes.images.networks import make
from rarefy.recipes.images.settings import ImageSettings
from rarefy.recipes.images.task import ImagesTask
from rarefy.recipes.run import load_twin, read_run_settings, run_record
from rarefy.recipes.task import SPARSE
from rarefy.training.twin import Twin


@dataclass(frozen=True)
class Classifier:
    """A trained network with what it has to be told and what it means."""

    model: nn.Module
    """On the CPU, in evaluation mode: scaled images -> (N, K) logits."""
    names: tuple[str, ...]
    """Of the K classes."""
    image: ImageShape
    scale: tuple[float, float]
    """Mean and deviation of the pixels it was trained on, of which 255 is 1."""

    def read(self, *paths: Path | str) -> Tensor:
        """uint8 pixels of pictures, as `prepare` takes them, grey where the network is.

        Raises:
            ValueError: a file cannot be read, or has another size than the images that it was trained on.
        """
        pictures = []
        for path in map(Path, paths):
            pixels = read_picture(path, "RGB" if self.image.channels == 3 else "L")
            if tuple(pixels.shape[:2]) != (self.image.height, self.image.width):
                raise ValueError(
                    f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, and the network was trained on "
                    f"{self.image.width} x {self.image.height}: bring it to that size first"
                )
            pictures.append(pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels)
        return torch.stack(pictures)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 pixels, (N, H, W) of grey images or (N, 3, H, W), as the network takes them: float32 of that shape.

        Raises:
            ValueError: another shape or dtype than that of the images it was trained on.
        """
        wanted = tuple(self.image[:3] if self.image.channels > 1 else self.image[1:3])
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images should be uint8 of shape (N, {', '.join(map(str, wanted))}), as in training; got "
                f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
            )
        return scaled(images, self.scale)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        """The likeliest class of each of some images; arguments and errors as for `prepare`."""
        return [self.names[at] for at in self.model(self.prepare(images)).argmax(1).tolist()]


def load_classifier(folder: Path | str, name: str = SPARSE) -> Classifier:
    """A run's network as its last checkpoint has it, without the data that it was trained on.

    Args:
        folder: of a run of `rarefy train images`, finished or not.
        name: "sparse" or "dense".
    Raises:
        ValueError: the folder is no run, or not of images, it has no checkpoint of that network, or a file is damaged.
    """
    folder = Path(folder)
    settings: ImageSettings = read_run_settings(ImagesTask, folder)
    image, names, scale = _about(folder)
    here = dataclasses.replace(settings, device="cpu", compile=None)
    twin = load_twin(folder, here, name, _maker(image))
    return Classifier(twin.model.eval(), names, image, scale)


def _maker(image: ImageShape) -> Callable[[ImageSettings, bool], Twin]:
    return lambda settings, dense: make(settings, image, dense)


def _about(folder: Path) -> tuple[ImageShape, tuple[str, ...], tuple[float, float]]:
    try:
        said = run_record(folder)["images"]
        image = ImageShape(**{key: int(said[key]) for key in ImageShape._fields})
        return image, tuple(map(str, said["names"])), (float(said["mean"]), float(said["deviation"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the log of {folder} does not say what its images are like ({error}): it is damaged"
        ) from error
