"""The validation split, every image exactly once and centred as torchvision does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from deitfast.data import dali
from deitfast.data.batch import to_device
from deitfast.data.cores import thread_count
from deitfast.data.cpu_ops import resized
from deitfast.data.dali import Feed, Runner, gathered
from deitfast.data.manifest import Manifest, as_ppm
from deitfast.data.quarantine import Quarantine
from deitfast.errors import DeitfastError
from deitfast.errors import say as say_to_stderr


class EvalLoader:
    """Iterates over this process's contiguous share of a split: every image exactly once over all processes.

    The short side (both with squash) is resized to int(image_size / crop_ratio) and the centre cut out, with the sizes
    and offsets that torchvision's Resize and CenterCrop compute; interpolation: nearest, bilinear, bicubic or
    lanczos. Yields images, uint8 (m, H, W, 3), and labels, int64 (m,), both on the device, in the manifest's order. The
    last batch may be short; a share may be empty.

    An image that became unreadable since the scan is left out of its batch, told through `say` (None: stderr) and kept
    in `quarantined`; beyond `bad_limit` of the split TooManyBadFiles is raised.
    """

    def __init__(
        self,
        manifest: Manifest,
        image_size: int,
        crop_ratio: float = 0.875,
        batch: int = 256,
        *,
        squash: bool = False,
        interpolation: str = "bicubic",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
        decode: str = "auto",
        say: Callable[[str], None] | None = None,
        bad_limit: float = 0.001,
    ) -> None:
        if not 0 < crop_ratio <= 1:
            raise DeitfastError(f"crop ratio {crop_ratio} must be above 0 and at most 1")
        self.manifest, self.image_size, self.crop_ratio, self.batch = manifest, image_size, crop_ratio, batch
        self.squash, self.interpolation = squash, interpolation
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        self.first, self.last = (len(manifest) * r // world_size for r in (rank, rank + 1))
        # An iteration needs its own pipeline: DALI does not rewind.
        self._threads = thread_count(workers)
        self._quarantine = Quarantine(manifest, 0, bad_limit * len(manifest), say or say_to_stderr)
        # A measurement would cost more than it gains in a pass over a validation set.
        self._decoder = "cpu" if decode == "cpu" else "gpu"

    def __len__(self) -> int:
        """Batches of this process."""
        return -(-(self.last - self.first) // self.batch)

    @property
    def quarantined(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that this process found unreadable since it began."""
        return self._quarantine.files

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if not len(self):
            return
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="deitfast-views")
        runner: Runner[_EvalFeed] = Runner(
            self._quarantine,
            self._prepare,
            len(self),
            self._graph_cpu if self._on_cpu else self._graph_gpu,
            partial(self._collect_cpu, pool) if self._on_cpu else self._collect_gpu,
            parameters=0 if self._on_cpu else 2,
            max_batch=min(self.batch, self.last - self.first),
            device=self.device,
            threads=self._threads,
        )
        with pool, closing(runner):
            for feed, images in runner:
                self._quarantine.check()
                if len(feed.row):
                    yield images, to_device(self.manifest.label[feed.distinct[feed.row]], self.device)

    def _prepare(self, i: int) -> _EvalFeed:
        index = np.arange(self.first + i * self.batch, min(self.first + (i + 1) * self.batch, self.last))
        encoded = [self._read(j) for j in index.tolist()]
        readable = np.array([data is not None for data in encoded])
        width, height = np.where(readable, band_of(self.manifest.width[index], self.manifest.height[index]), 1)
        size, start = eval_geometry(width, height, self.image_size, self.crop_ratio, self.squash)
        return _EvalFeed(
            distinct=index,
            encoded=[_ONE_PIXEL if data is None else data for data in encoded],
            parameters=[] if self._on_cpu else [size.astype(np.int32), start.astype(np.int32)],
            row=np.flatnonzero(readable),
            size=size,
            start=start,
        )

    def _read(self, i: int) -> np.ndarray | None:
        """The bytes of image i; of one so long that resizing all of it would fill the memory, its middle alone."""
        width, height = int(self.manifest.width[i]), int(self.manifest.height[i])
        if not is_long(width, height):
            return self._quarantine.read(i)
        try:
            return as_ppm(middle(self.manifest.rgb(i)))
        except DeitfastError as error:
            self._quarantine.add(i, str(error))
            return None

    def _graph_cpu(self, encoded: Any) -> list[Any]:
        return [dali.decode(encoded, "cpu")]

    def _graph_gpu(self, encoded: Any, size: Any, start: Any) -> list[Any]:
        return [
            dali.crop(
                dali.resize(dali.decode_to_gpu(encoded, self._decoder), size, self.interpolation),
                start,
                [self.image_size, self.image_size],
            )
        ]

    def _collect_cpu(self, pool: ThreadPoolExecutor, feed: _EvalFeed, outputs: Sequence[Any]) -> torch.Tensor:
        batch = torch.empty((len(feed.row), self.image_size, self.image_size, 3), dtype=torch.uint8)

        def make(s: int) -> None:
            row = int(feed.row[s])
            batch[s] = self._centre(torch.from_dlpack(outputs[0][row]), feed.size[row], feed.start[row])

        list(pool.map(make, range(len(batch))))
        return batch

    def _centre(self, image: torch.Tensor, size: np.ndarray, start: np.ndarray) -> torch.Tensor:
        (height, width), (top, left) = size.tolist(), start.tolist()
        if self.interpolation == "bicubic":
            whole = resized(image, height, width)
        else:
            from PIL import Image

            kind = Image.Resampling[self.interpolation.upper()]
            whole = torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize((width, height), kind)))
        return whole[top : top + self.image_size, left : left + self.image_size]

    def _collect_gpu(self, feed: _EvalFeed, outputs: Sequence[Any]) -> torch.Tensor:
        return gathered(outputs, feed.row, np.zeros_like(feed.row), self.device)


@dataclass
class _EvalFeed(Feed):
    """The feed of a validation batch. size, start: int64 (d, 2), of `eval_geometry`."""

    row: np.ndarray  # which of the distinct images are readable
    size: np.ndarray
    start: np.ndarray


_ONE_PIXEL = np.frombuffer(bytearray(b"P6 1 1 255\n\0\0\0"), np.uint8)
"""Fills the place of an unreadable image: DALI wants at least one sample in a batch."""


_LONGEST = 50
"""Ratio of the sides beyond which only the middle of an image is resized, of which the centre is then cut."""


def is_long(width: int, height: int) -> bool:
    return max(width, height) > _LONGEST * min(width, height)


def band_of(width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of what `middle` leaves of images of that width and height, int64 (n,) each."""
    longest = _LONGEST * np.minimum(width, height)
    return np.minimum(width, longest), np.minimum(height, longest)


def middle(pixels: np.ndarray) -> np.ndarray:
    """The middle of pixels (H, W, 3): all of it, but of the long side at most `_LONGEST` times the short one."""
    height, width = pixels.shape[:2]
    wide, high = (int(side) for side in band_of(np.array(width), np.array(height)))
    top, left = (height - high) // 2, (width - wide) // 2
    return pixels[top : top + high, left : left + wide]


def eval_geometry(
    width: np.ndarray, height: np.ndarray, image_size: int, crop_ratio: float, squash: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Resized (height, width) and crop offset (top, left) of every image, int64 (n, 2) each, as torchvision's.

    Source: torchvision `transforms/functional.py`: the long side is truncated, the offset rounded half to even.
    """
    short = int(image_size / crop_ratio)
    sides = np.stack([height, width], axis=1)
    least = sides.min(axis=1, keepdims=True)
    if squash:
        sides = least = np.ones_like(sides)
    size = np.where(sides == least, short, (short * sides / least).astype(np.int64))
    return size, np.rint((size - image_size) / 2).astype(np.int64)
