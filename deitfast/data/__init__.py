"""Images in: sources and manifests, the order and the draws, DALI loaders, and the device stage of the augmentation.

dataset = open_dataset("digits")
with TrainLoader(dataset.train, recipe, image_size=224, micro_batch=64) as loader:
    for batch in loader:
        images, targets = prepare(batch, recipe)
"""

from deitfast.data import philox
from deitfast.data.augment import IMAGENET_MEAN, IMAGENET_STD, Targets, normalise, prepare
from deitfast.data.eval_loader import EvalLoader
from deitfast.data.loaders import Batch, TrainLoader
from deitfast.data.manifest import Manifest
from deitfast.data.quarantine import TooManyBadFiles
from deitfast.data.sampler import Plan
from deitfast.data.sources import Dataset, imagenet_classes, open_dataset

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "Dataset",
    "EvalLoader",
    "Manifest",
    "Plan",
    "Targets",
    "TooManyBadFiles",
    "TrainLoader",
    "imagenet_classes",
    "normalise",
    "open_dataset",
    "philox",
    "prepare",
]
