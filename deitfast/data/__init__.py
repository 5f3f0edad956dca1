"""Images in: from a folder to micro-batches on the device. The only place that knows DALI.

disk     sources, indexing, tfrecord (what is there) -> scan (what is sound) -> manifest (remembered); quarantine
order    sampler (which image fills which slot of which step), draws (every random parameter), philox
pixels   train_loader, eval_loader: dali, decoder (JPEG to uint8) -> cpu_ops or kernels: crop, flip, augmentation
         (drawn in augmentation_draws) -> batch (normalise, erase, mix; on the device)
tools    prepared_shards, check, show: the commands of `deitfast data`

dataset = open_dataset("digits")
with TrainLoader(dataset.train, recipe, image_size=224, micro_batch=64) as loader:
    for batch in loader:
        images, targets = prepare(batch, recipe)
"""

from deitfast.data import philox
from deitfast.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch, Targets, normalise, prepare
from deitfast.data.eval_loader import EvalLoader
from deitfast.data.manifest import Manifest
from deitfast.data.quarantine import TooManyBadFiles
from deitfast.data.sampler import Order
from deitfast.data.sources import Dataset, imagenet_classes, open_dataset
from deitfast.data.train_loader import TrainLoader

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "Dataset",
    "EvalLoader",
    "Manifest",
    "Order",
    "Targets",
    "TooManyBadFiles",
    "TrainLoader",
    "imagenet_classes",
    "normalise",
    "open_dataset",
    "philox",
    "prepare",
]
