"""The loaders: micro-batches of a training run in slot order, and a validation split image by image.

What a loader yields is a pure function of (seed, step): every crop and flip is drawn on the host (`draws`) and given to
DALI (`pipeline`), so resuming is starting at another step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deitfast.data import draws
from deitfast.data.manifest import Manifest
from deitfast.data.pipeline import Feed, Runner, crop, decode, decode_crop, flip, resize, thread_count, to_device
from deitfast.data.sampler import Plan
from deitfast.errors import DeitfastError

if TYPE_CHECKING:
    from deitfast.recipe import Recipe


@dataclass
class Batch:
    """One micro-batch of a training step: m samples, of which rows s and s xor 1 are a mixup pair.

    images: uint8 (m, H, W, 3), flipped, on the device. labels: int64 (m,), on the device. The device stage
    (`augment`) reads the rest: small tensors on the device, one row a sample.
    """

    step: int  # global optimisation step
    micro: int  # which micro-batch of this process in the step
    epoch: int
    seed: int
    images: torch.Tensor
    labels: torch.Tensor
    slots: np.ndarray  # int64 (m,), slots of the global batch
    index: torch.Tensor  # int64 (m,), image in the manifest
    view: torch.Tensor  # int64 (m,), copy of repeated augmentation
    erase: torch.Tensor  # int64 (m, 4), erased rectangle (top, left, height, width), zeros where there is none
    erased_pixels: int  # sum of the rectangles' areas, known on the host
    lam: torch.Tensor  # float32 (m,), weight of the own label
    mix_box: torch.Tensor  # int64 (m, 4), rectangle that cutmix takes from the partner, zeros for mixup
    mixes: bool  # whether the recipe mixes at all


class TrainLoader:
    """Iterates over this process's micro-batches from `start_step` up to (not including) `stop_step`, in order.

    The process `rank` of `world` owns slots [rank * batch / world, (rank + 1) * batch / world) of every global
    batch and cuts them into micro-batches in turn. `plan` describes the order; `seconds_waiting` is host time blocked
    on data so far. It can be iterated once. Use it as a context manager, or call close().

    Raises DeitfastError for a batch that world and micro_batch do not divide, for an odd one with mixup or cutmix, and,
    while iterating, for an image that no longer decodes.
    """

    def __init__(
        self,
        manifest: Manifest,
        recipe: Recipe,
        image_size: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        start_step: int = 0,
        stop_step: int | None = None,
    ) -> None:
        self.recipe, self.manifest, self.image_size = recipe, manifest, image_size
        self.device = torch.device(device)
        self.mixes = recipe.mixes
        _check_batch(recipe.batch, world, micro_batch, self.mixes)
        self.plan = Plan(len(manifest), recipe.batch, recipe.repeats, recipe.seed, recipe.mix_group)
        self.start_step = start_step
        self.stop_step = self.plan.steps_per_epoch if stop_step is None else stop_step
        self.micro_batch = micro_batch
        self.micro_per_step = recipe.batch // world // micro_batch
        self._groups = -(-recipe.batch // recipe.mix_group)
        self._first_slot = rank * (recipe.batch // world)
        self._runner: Runner[_TrainFeed] = Runner(
            manifest,
            self._prepare,
            len(self),
            self._graph,
            parameters=3 * recipe.repeats,
            max_batch=micro_batch,
            device=self.device,
            threads=thread_count(recipe.workers),
        )

    def __len__(self) -> int:
        """Micro-batches in all."""
        return max(self.stop_step - self.start_step, 0) * self.micro_per_step

    @property
    def seconds_waiting(self) -> float:
        return self._runner.seconds_waiting

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.close()

    def __iter__(self) -> Iterator[Batch]:
        for feed, images in self._runner:
            device = self.device
            yield Batch(
                step=feed.step,
                micro=feed.micro,
                epoch=feed.epoch,
                seed=self.recipe.seed,
                images=images,
                labels=to_device(self.manifest.label[feed.index], device),
                slots=feed.slots,
                index=to_device(feed.index, device),
                view=to_device(feed.view, device),
                erase=to_device(feed.erase, device),
                erased_pixels=int((feed.erase[:, 2] * feed.erase[:, 3]).sum()),
                lam=to_device(feed.lam, device),
                mix_box=to_device(feed.mix_box, device),
                mixes=self.mixes,
            )

    def _prepare(self, i: int) -> _TrainFeed:
        """Read the bytes and draw the parameters of micro-batch i of this loader."""
        r, manifest = self.recipe, self.manifest
        step, micro = self.start_step + i // self.micro_per_step, i % self.micro_per_step
        slots = self._first_slot + micro * self.micro_batch + np.arange(self.micro_batch)
        index, view, epoch = self.plan.slots(step)
        index, view = index[slots], view[slots]
        lam, mix_box = draws.mix(
            self.image_size, self._groups, step, r.seed, r.mixup, r.cutmix, r.mix_probability, r.mix_switch
        )

        # Every view of an image is cropped, also the few whose slot lies in another micro-batch; view-major rows.
        distinct, row = np.unique(index, return_inverse=True)
        images, views = np.tile(distinct, r.repeats), np.repeat(np.arange(r.repeats), len(distinct))
        width, height = manifest.width[images], manifest.height[images]
        box = draws.random_resized_crop(width, height, images, epoch, views, r.seed, (r.crop_min, r.crop_max))
        mirrored = draws.flip(images, epoch, views, r.seed, r.flip).astype(np.int32).reshape(r.repeats, -1)
        start, shape = (box[:, i : i + 2].astype(np.int32).reshape(r.repeats, -1, 2) for i in (0, 2))
        parameters = [x[v] for v in range(r.repeats) for x in (start, shape, mirrored)]
        return _TrainFeed(
            distinct=distinct,
            encoded=[manifest.read(i) for i in distinct.tolist()],
            parameters=parameters,
            take=np.stack([row, view], axis=1),
            step=step,
            micro=micro,
            epoch=epoch,
            slots=slots,
            index=index,
            view=view,
            erase=draws.random_erasing(self.image_size, index, epoch, view, r.seed, r.erase),
            lam=lam[slots // r.mix_group],
            mix_box=mix_box[slots // r.mix_group],
        )

    def _graph(self, encoded: Any, *parameters: Any) -> list[Any]:
        starts, shapes, mirrored = (parameters[i::3] for i in range(3))
        if len(starts) == 1 and self.device.type == "cpu":
            views = [decode_crop(encoded, starts[0], shapes[0])]
        else:
            images = decode(encoded, self.device)
            views = [crop(images, start, shape) for start, shape in zip(starts, shapes, strict=True)]
        size = [self.image_size, self.image_size]
        return [flip(resize(view, size), m) for view, m in zip(views, mirrored, strict=True)]


@dataclass
class _TrainFeed(Feed):
    """The feed of a training micro-batch, with what `Batch` needs of it (numpy)."""

    step: int
    micro: int
    epoch: int
    slots: np.ndarray
    index: np.ndarray
    view: np.ndarray
    erase: np.ndarray
    lam: np.ndarray
    mix_box: np.ndarray


class EvalLoader:
    """Iterates once over this process's contiguous share of a split: every image exactly once over all processes.

    The short side is resized to int(image_size / crop_ratio) and the centre cut out, with the sizes and offsets that
    torchvision's Resize and CenterCrop compute. Yields images, uint8 (m, H, W, 3), and labels, int64 (m,), both on the
    device, in the manifest's order. The last batch may be short; a share may be empty.
    """

    def __init__(
        self,
        manifest: Manifest,
        image_size: int,
        crop_ratio: float = 0.875,
        batch: int = 256,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        if not 0 < crop_ratio <= 1:
            raise DeitfastError(f"crop ratio {crop_ratio} must be above 0 and at most 1")
        self.manifest, self.image_size, self.crop_ratio, self.batch = manifest, image_size, crop_ratio, batch
        self.device = torch.device(device)
        self.first, self.last = (len(manifest) * r // world for r in (rank, rank + 1))
        # An iteration needs its own pipeline: DALI does not rewind.
        self._threads = thread_count(workers)

    def __len__(self) -> int:
        """Batches of this process."""
        return -(-(self.last - self.first) // self.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if not len(self):
            return
        runner: Runner[Feed] = Runner(
            self.manifest,
            self._prepare,
            len(self),
            self._graph,
            parameters=2,
            max_batch=min(self.batch, self.last - self.first),
            device=self.device,
            threads=self._threads,
        )
        try:
            for feed, images in runner:
                yield images, to_device(self.manifest.label[feed.distinct], self.device)
        finally:
            runner.close()

    def _prepare(self, i: int) -> Feed:
        index = np.arange(self.first + i * self.batch, min(self.first + (i + 1) * self.batch, self.last))
        size, start = eval_geometry(
            self.manifest.width[index], self.manifest.height[index], self.image_size, self.crop_ratio
        )
        return Feed(
            distinct=index,
            encoded=[self.manifest.read(j) for j in index.tolist()],
            parameters=[size.astype(np.int32), start.astype(np.int32)],
            take=np.stack([np.arange(len(index)), np.zeros(len(index), np.int64)], axis=1),
        )

    def _graph(self, encoded: Any, size: Any, start: Any) -> list[Any]:
        return [crop(resize(decode(encoded, self.device), size), start, [self.image_size, self.image_size])]


def eval_geometry(
    width: np.ndarray, height: np.ndarray, image_size: int, crop_ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resized (height, width) and crop offset (top, left) of every image, int64 (n, 2) each, as torchvision's.

    Source: torchvision `transforms/functional.py`: the long side is truncated, the offset rounded half to even.
    """
    short = int(image_size / crop_ratio)
    sides = np.stack([height, width], axis=1)
    least = sides.min(axis=1, keepdims=True)
    size = np.where(sides == least, short, (short * sides / least).astype(np.int64))
    return size, np.rint((size - image_size) / 2).astype(np.int64)


def _check_batch(batch: int, world: int, micro_batch: int, mixes: bool) -> None:
    if mixes and (batch % 2 or micro_batch % 2):
        what = f"batch {batch}" if batch % 2 else f"micro-batch {micro_batch}"
        raise DeitfastError(
            f"{what} is odd, but mixup and cutmix mix pairs. Make it even, or give --mixup 0 --cutmix 0"
        )
    if micro_batch < 1 or batch % (world * micro_batch):
        raise DeitfastError(
            f"batch {batch} is not a multiple of {world} processes x micro-batch {micro_batch}. Change --micro-batch"
        )
