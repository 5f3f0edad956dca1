"""The training loader: micro-batches of a run in slot order.

What a loader yields is a pure function of (seed, step) and of the files: every crop, flip and photometric operation is
drawn on the host, so resuming is starting at another step. On a GPU DALI decodes, crops, resizes and flips, and the
augmentation's kernels follow; on a CPU DALI decodes and threads do the rest. All of it runs ahead of the consumer. A
file that became unreadable since the scan is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deitfast.data import dali, draws
from deitfast.data.augmentation import Augmentation
from deitfast.data.augmentation_draws import AugmentationDraws
from deitfast.data.batch import Batch
from deitfast.data.cores import thread_count
from deitfast.data.cpu_ops import resized_crop
from deitfast.data.dali import Feed, Runner, gathered
from deitfast.data.decoder import choose_decoder
from deitfast.data.manifest import Manifest
from deitfast.data.quarantine import Quarantine
from deitfast.data.sampler import Order
from deitfast.errors import DeitfastError
from deitfast.errors import say as say_to_stderr

if TYPE_CHECKING:
    from deitfast.recipe import Recipe


class TrainLoader:
    """Iterates over this process's micro-batches from `start_step` up to (not including) `stop_step`, in order.

    The process `rank` of `world_size` owns slots [rank * batch / world_size, (rank + 1) * batch / world_size) of every
    global batch and cuts them into micro-batches in turn. `order` says which; `seconds_waiting` is host time blocked
    on data so far. It can be iterated once. Use it as a context manager, or call close().

    say: gets a line for each file that became unreadable, from the consuming thread; None: stderr. bad_list: file in
    which they are all listed. `quarantined` holds those that this process has met. decoder: gpu or cpu, where it has
    been chosen already.

    Raises DeitfastError for a batch that world_size and micro_batch do not divide, and for an odd one with mixup or
    cutmix. While iterating, a single process raises TooManyBadFiles beyond the recipe's bad_limit; of several processes
    none knows the sum, so the caller compares it and stops them together.
    """

    def __init__(
        self,
        manifest: Manifest,
        recipe: Recipe,
        image_size: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        start_step: int = 0,
        stop_step: int | None = None,
        say: Callable[[str], None] | None = None,
        bad_list: Path | None = None,
        decoder: str | None = None,
    ) -> None:
        self.recipe, self.manifest, self.image_size = recipe, manifest, image_size
        self.device = torch.device(device)
        say = say or say_to_stderr
        _check_batch(recipe, world_size, micro_batch)
        self.order = Order.of(manifest.label, recipe)
        self.start_step = start_step
        self.stop_step = self.order.steps_per_epoch if stop_step is None else stop_step
        self.micro_batch = micro_batch
        self.micro_per_step = recipe.batch // world_size // micro_batch
        self.augmentation = Augmentation(recipe, image_size, self.device)
        limit = recipe.bad_limit * len(manifest) if world_size == 1 else float("inf")
        self._quarantine = Quarantine(manifest, recipe.seed, limit, say, bad_list)
        self._groups = -(-recipe.batch // recipe.mix_group)
        self._first_slot = rank * (recipe.batch // world_size)
        threads = thread_count(recipe.workers)
        self._on_cpu = self.device.type == "cpu"
        self._decoder = decoder or choose_decoder(recipe.decode, manifest, image_size, self.device, threads, say)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="deitfast-views")
        self._runner: Runner[_TrainFeed] = Runner(
            self._quarantine,
            self._prepare,
            len(self),
            self._graph_cpu if self._on_cpu else self._graph_gpu,
            self._collect_cpu if self._on_cpu else self._collect_gpu,
            parameters=2 if self._on_cpu else 3 * recipe.repeats,
            max_batch=micro_batch,
            device=self.device,
            threads=threads,
        )

    def count_waits_unless(self, busy: Callable[[], bool]) -> None:
        """Leave out of `seconds_waiting` what passes while `busy` says that the consumer has work left."""
        self._runner.busy = busy

    def __len__(self) -> int:
        """Micro-batches in all."""
        return max(self.stop_step - self.start_step, 0) * self.micro_per_step

    @property
    def seconds_waiting(self) -> float:
        return self._runner.seconds_waiting

    @property
    def quarantined(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that this process found unreadable since it began."""
        return self._quarantine.files

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.close()
        self._pool.shutdown()

    def __iter__(self) -> Iterator[Batch]:
        for feed, images in self._runner:
            self._quarantine.check()
            yield replace(feed.batch.to(self.device), images=images)

    def _prepare(self, i: int) -> _TrainFeed:
        """Read the bytes and draw the parameters of micro-batch i of this loader."""
        r, manifest = self.recipe, self.manifest
        step, micro = self.start_step + i // self.micro_per_step, i % self.micro_per_step
        slots = self._first_slot + micro * self.micro_batch + np.arange(self.micro_batch)
        index, view, epoch = self.order.slots(step)
        index, encoded = self._quarantine.resolve(index[slots])
        view = view[slots]
        lam, mix_box = draws.mix(
            self.image_size, self._groups, step, r.seed, r.mixup, r.cutmix, r.mix_probability, r.mix_switch
        )

        # Every copy of an entry is drawn, also the few whose slot lies in another micro-batch; (copy, entry) rows.
        time, copy = view // r.repeats, view % r.repeats
        entries, row = np.unique(np.stack([index, time]), axis=1, return_inverse=True)
        images, copies = np.tile(entries[0], r.repeats), np.repeat(np.arange(r.repeats), entries.shape[1])
        views = np.tile(entries[1], r.repeats) * r.repeats + copies
        width, height = manifest.width[images], manifest.height[images]
        box = draws.random_resized_crop(width, height, images, epoch, views, r.seed, (r.crop_min, r.crop_max))
        box = box.astype(np.int32).reshape(r.repeats, -1, 4)
        start, shape = (np.ascontiguousarray(box[..., i : i + 2]) for i in (0, 2))
        mirrored = draws.flip(images, epoch, views, r.seed, r.flip).astype(np.int32).reshape(r.repeats, -1)
        if self._on_cpu:  # of each image the smallest rectangle that holds its crops
            first, last = start.min(axis=0), (start + shape).max(axis=0)
            parameters = [first, last - first]
            box[..., :2] -= first
        else:
            parameters = [x[v] for v in range(r.repeats) for x in (start, shape, mirrored)]
        return _TrainFeed(
            distinct=entries[0],
            encoded=[encoded[i] for i in entries[0].tolist()],
            parameters=parameters,
            row=row,
            copy=copy,
            box=box[copy, row],
            mirrored=mirrored[copy, row],
            augmentation=self.augmentation.draw(index, epoch, view) if self.augmentation.active else None,
            batch=Batch(
                images=_NOT_YET,
                labels=torch.from_numpy(manifest.label[index]),
                index=torch.from_numpy(index),
                view=torch.from_numpy(view),
                epoch=torch.tensor([epoch]),
                erase=torch.from_numpy(draws.random_erasing(self.image_size, index, epoch, view, r.seed, r.erase)),
                lam=torch.from_numpy(lam[slots // r.mix_group]),
                mix_box=torch.from_numpy(mix_box[slots // r.mix_group]),
                step=step,
                slots=slots,
            ),
        )

    def _graph_cpu(self, encoded: Any, start: Any, shape: Any) -> list[Any]:
        return [dali.decode_crop(encoded, start, shape)]

    def _graph_gpu(self, encoded: Any, *parameters: Any) -> list[Any]:
        images, size = dali.decode_to_gpu(encoded, self._decoder), [self.image_size, self.image_size]
        starts, shapes, mirrored = (parameters[i::3] for i in range(3))
        views = [dali.crop(images, start, shape) for start, shape in zip(starts, shapes, strict=True)]
        return [dali.flip(dali.resize(view, size), m) for view, m in zip(views, mirrored, strict=True)]

    def _collect_cpu(self, feed: _TrainFeed, outputs: Sequence[Any]) -> torch.Tensor:
        batch = torch.empty((len(feed.row), self.image_size, self.image_size, 3), dtype=torch.uint8)

        def make(s: int) -> None:
            image = torch.from_dlpack(outputs[0][int(feed.row[s])])
            batch[s] = resized_crop(image, feed.box[s], self.image_size, bool(feed.mirrored[s]))
            if feed.augmentation is not None:
                own = slice(s, s + 1)
                batch[own] = self.augmentation.apply(batch[own], feed.augmentation[own])

        list(self._pool.map(make, range(len(batch))))
        return batch

    def _collect_gpu(self, feed: _TrainFeed, outputs: Sequence[Any]) -> torch.Tensor:
        images = gathered(outputs, feed.row, feed.copy, self.device)
        return images if feed.augmentation is None else self.augmentation.apply(images, feed.augmentation)


@dataclass
class _TrainFeed(Feed):
    """The feed of a training micro-batch."""

    row: np.ndarray  # which of the distinct entries
    copy: np.ndarray  # which of its views
    box: np.ndarray  # int32 (m, 4), the crop in what the CPU decoded (top, left, height, width)
    mirrored: np.ndarray
    augmentation: AugmentationDraws | None  # None where it does nothing
    batch: Batch  # on the host, without its images


_NOT_YET = torch.empty(0)


def _check_batch(recipe: Recipe, world_size: int, micro_batch: int) -> None:
    recipe.refuse_odd(batch=recipe.batch, micro_batch=micro_batch)
    if micro_batch < 1 or recipe.batch % (world_size * micro_batch):
        raise DeitfastError(
            f"batch {recipe.batch} is not a multiple of {world_size} processes x micro-batch {micro_batch}. "
            "Change --micro-batch"
        )
