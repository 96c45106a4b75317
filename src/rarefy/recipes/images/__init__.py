"""An MLP on labelled images, sparse from its first step. `rarefy compare images` trains it."""

from rarefy.recipes.images.data import AllImages, ImageBatches, ImageSet, load_images
from rarefy.recipes.images.networks import flops_per_image, make_dense, make_sparse
from rarefy.recipes.images.settings import ImageSettings

__all__ = [
    "AllImages",
    "ImageBatches",
    "ImageSet",
    "ImageSettings",
    "flops_per_image",
    "load_images",
    "make_dense",
    "make_sparse",
]
