"""DALI at work: feeds of encoded bytes and per-sample parameters in, uint8 images out.

DALI is given every parameter by the host and holds no state of its own. An image whose views lie in one micro-batch is
decoded once and cropped several times. EXIF orientation is off, as in PIL; the resize is cubic with antialiasing.

On a GPU the same graph decodes with nvJPEG ("mixed") and resizes there. That path is written from DALI's documentation
and has not yet run on a GPU.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from deitfast.data.manifest import Manifest
from deitfast.errors import DeitfastError

_QUEUE = 2  # batches DALI holds ready
_AHEAD = 2  # batches whose bytes are read and whose parameters are drawn before DALI asks


@dataclass
class Feed:
    """What one run of a DALI pipeline is given: `distinct` images and, for each output, per-image parameters."""

    distinct: np.ndarray  # int64 (d,), images in the manifest
    encoded: list[np.ndarray]  # uint8 bytes of each
    parameters: list[np.ndarray]  # each (d, ...), in the graph's order
    take: np.ndarray  # int64 (m, 2), (image in the batch, output) of each wanted sample


F = TypeVar("F", bound=Feed)


class Runner(Generic[F]):
    """Drives one DALI pipeline over a fixed sequence of feeds, made ahead of time in background threads.

    prepare(i) makes feed i; graph(encoded, *parameters) returns the outputs, uint8 (size, size, 3) a sample.
    """

    def __init__(
        self,
        manifest: Manifest,
        prepare: Callable[[int], F],
        count: int,
        graph: Callable[..., Sequence[Any]],
        parameters: int,
        max_batch: int,
        device: torch.device,
        threads: int,
    ) -> None:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        self.manifest, self.prepare, self.count, self.device = manifest, prepare, count, device
        self.seconds_waiting = 0.0
        self._next = 0
        self._ahead: deque[Future[F]] = deque()
        self._running: deque[F] = deque()
        self._readers = ThreadPoolExecutor(min(threads, 4), thread_name_prefix="deitfast-read")
        self._pipeline: Any = Pipeline(
            batch_size=max_batch,
            num_threads=threads,
            device_id=_device_index(device),
            prefetch_queue_depth=_QUEUE,
            seed=0,  # nothing in the graph draws
        )
        with self._pipeline:
            encoded, *rest = fn.external_source(
                source=self._feed,
                num_outputs=1 + parameters,
                batch=True,
                dtype=[types.DALIDataType.UINT8] + [types.DALIDataType.INT32] * parameters,
            )
            self._pipeline.set_outputs(*graph(encoded, *rest))
        self._pipeline.build()

    def _feed(self, _iteration: int) -> tuple[Any, ...]:
        """DALI's callback: hand over the next feed and start reading the one after those in flight."""
        while len(self._ahead) <= _AHEAD and self._next < self.count:
            self._ahead.append(self._readers.submit(self.prepare, self._next))
            self._next += 1
        if not self._ahead:
            raise StopIteration
        feed = self._ahead.popleft().result()
        self._running.append(feed)
        return (feed.encoded, *feed.parameters)

    def __iter__(self) -> Iterator[tuple[F, torch.Tensor]]:
        """Each feed with its wanted samples: uint8 (m, H, W, 3) on the device."""
        for _ in range(self.count):
            started = time.perf_counter()
            try:
                outputs = self._pipeline.run(*self._stream())
            except RuntimeError as error:
                raise self._explain(error) from error
            feed = self._running.popleft()
            images = self._gather(outputs, feed.take)
            self.seconds_waiting += time.perf_counter() - started
            yield feed, images

    def _stream(self) -> tuple[Any, ...]:
        return (torch.cuda.current_stream(self.device),) if self.device.type == "cuda" else ()

    def _gather(self, outputs: Sequence[Any], take: np.ndarray) -> torch.Tensor:
        """Copy the wanted samples out of DALI's buffers, which the next run reuses."""
        if self.device.type == "cuda":
            # The outputs are in order on the current stream, and so are these copies: no wait.
            dense = torch.stack([torch.from_dlpack(o.as_tensor()) for o in outputs], dim=1)
            return dense.flatten(0, 1)[to_device(take[:, 0] * len(outputs) + take[:, 1], self.device)]
        size = outputs[0].at(0).shape
        images = np.empty((len(take), *size), np.uint8)
        for row, (i, branch) in enumerate(take.tolist()):
            images[row] = outputs[branch].at(i)
        return torch.from_numpy(images)

    def _explain(self, error: RuntimeError) -> DeitfastError:
        """Name the file that DALI could not decode; its own message has at most a number."""
        for feed in self._running:
            for i in feed.distinct.tolist():
                reason = self.manifest.diagnose(i)
                if reason is not None:
                    return DeitfastError(f"{self.manifest.name(i)} in {self.manifest.root} unreadable: {reason}")
        names = ", ".join(self.manifest.name(i) for i in self._running[0].distinct[:3]) if self._running else "?"
        text = " ".join(str(error).split())
        return DeitfastError(f"DALI failed on a batch that starts with {names}: {text[:300]}")

    def close(self) -> None:
        """Stop the reading threads and free DALI's buffers; further use is an error."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._running.clear()
        self._pipeline = None


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device; for a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def thread_count(workers: int) -> int:
    """DALI threads of this process: `workers`, or this machine's cores shared by torchrun's processes on it."""
    return workers or max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _device_index(device: torch.device) -> int | None:
    """DALI's device_id: None builds a pipeline that needs no GPU."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def decode(encoded: Any, device: torch.device) -> Any:
    """Graph node: whole images, RGB."""
    from nvidia.dali import fn

    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # nvJPEG's chroma then agrees with libjpeg's
    )


def decode_crop(encoded: Any, start: Any, shape: Any) -> Any:
    """Graph node: one rectangle of each image, decoding little else; CPU only. The same bits as `crop(decode(...))`."""
    from nvidia.dali import fn

    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], adjust_orientation=False)


def crop(images: Any, start: Any, shape: Any) -> Any:
    """Graph node: the rectangle at `start` (top, left) of `shape` (height, width), pixels."""
    from nvidia.dali import fn

    return fn.slice(images, start=start, shape=shape, axes=[0, 1])


def resize(images: Any, size: Any) -> Any:
    """Graph node: to `size` (height, width), integers; cubic with antialiasing, as PIL's bicubic."""
    from nvidia.dali import fn, types

    if not isinstance(size, list):
        size = fn.cast(size, dtype=types.DALIDataType.FLOAT)  # DALI takes sizes as floats
    return fn.resize(images, size=size, interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True)


def flip(images: Any, mirrored: Any) -> Any:
    """Graph node: mirrored left to right where `mirrored` is 1."""
    from nvidia.dali import fn

    return fn.flip(images, horizontal=mirrored)
