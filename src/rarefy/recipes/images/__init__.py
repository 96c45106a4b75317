"""Networks that tell images apart, sparse from their first step: what `rarefy train images` does, and `compare images`.

from rarefy.recipes.images import load_classifier
names = load_classifier("runs/fashion")(pixels)   # uint8, (N, H, W) or (N, 3, H, W), as it was trained on
"""

from rarefy.recipes.images.batches import AllImages, ImageBatches
from rarefy.recipes.images.classifier import Classifier, load_classifier
from rarefy.recipes.images.data import ImageSet, ImageShape, load_images
from rarefy.recipes.images.networks import flops_per_image, make_dense, make_sparse, num_parameters
from rarefy.recipes.images.settings import ImageSettings
from rarefy.recipes.images.task import ImagesTask

__all__ = [
    "AllImages",
    "Classifier",
    "ImageBatches",
    "ImageSet",
    "ImageSettings",
    "ImageShape",
    "ImagesTask",
    "flops_per_image",
    "load_classifier",
    "load_images",
    "make_dense",
    "make_sparse",
    "num_parameters",
]
