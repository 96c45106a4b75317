"""Networks on labelled images, sparse from their first step. `rarefy compare images` trains them."""

from rarefy.recipes.images.data import AllImages, ImageBatches, ImageSet, ImageShape, load_images
from rarefy.recipes.images.networks import flops_per_image, make_dense, make_sparse, num_parameters
from rarefy.recipes.images.settings import ImageSettings

__all__ = [
    "AllImages",
    "ImageBatches",
    "ImageSet",
    "ImageSettings",
    "ImageShape",
    "flops_per_image",
    "load_images",
    "make_dense",
    "make_sparse",
    "num_parameters",
]
