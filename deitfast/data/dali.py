"""DALI at work: feeds of encoded bytes and per-sample parameters in, uint8 images out, made ahead in a thread.

DALI is given every parameter by the host and holds no state of its own. An image whose views lie in one micro-batch is
decoded once. EXIF orientation is off, as in PIL.

Three stages overlap, each a bounded number of batches ahead of the next: threads read bytes and draw parameters; DALI
runs its graph; one more thread makes a batch of DALI's output (`collect`), on a GPU on a stream of its own.

The GPU's graphs (nvJPEG, or decoding on the CPU; then crop and resize by DALI on its own stream) are written from
DALI's documentation and have not yet run on a GPU. A caller that captures a CUDA graph meanwhile needs
capture_error_mode="thread_local".
"""

from __future__ import annotations

import ctypes
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from deitfast.data.batch import to_device
from deitfast.data.quarantine import Quarantine
from deitfast.errors import DeitfastError

_QUEUE = 2  # batches DALI holds ready
_READY = 2  # finished batches held ready
_AHEAD = 2  # batches whose bytes are read and whose parameters are drawn before DALI asks
_TICK_S = 2e-3  # how often a busy consumer looks whether it still is
_POLL_S = 0.1  # how often a thread that waits for room looks whether it should stop


@dataclass
class Feed:
    """What one run of a DALI pipeline is given: `distinct` images and, for each output, per-image parameters."""

    distinct: np.ndarray  # int64 (d,), images in the manifest
    encoded: list[np.ndarray]  # uint8 bytes of each
    parameters: list[np.ndarray]  # each (d, ...), contiguous, in the graph's order


_NO_MEMORY = re.compile(r"out of memory|can't allocate|bad_alloc|memory allocation|memoryallocation", re.IGNORECASE)
_NO_GPU = re.compile(r"CUDA (runtime|driver) API error|cudaError|CUDA_ERROR", re.IGNORECASE)

F = TypeVar("F", bound=Feed)
Graph = Callable[..., Sequence[Any]]
"""graph(encoded, *parameters): the DALI nodes that are its outputs."""


class Runner(Generic[F]):
    """Drives DALI over a fixed sequence of feeds: yields each feed with its batch on the device.

    prepare(i): makes feed i; a pure function of i and of the quarantine. collect(feed, outputs): the batch out of
    DALI's outputs, whose memory the next run may reuse; called in this runner's thread. device: where DALI and batches
    are.

    An image that DALI cannot decode is found by trying the batch's images singly; PIL decodes it from then on, or it is
    quarantined. The batch is then made again: none is lost. It can be iterated once; close() ends the threads.
    """

    def __init__(
        self,
        quarantine: Quarantine,
        prepare: Callable[[int], F],
        count: int,
        graph: Graph,
        collect: Callable[[F, Sequence[Any]], torch.Tensor],
        parameters: int,
        max_batch: int,
        device: torch.device,
        threads: int,
    ) -> None:
        check_build(device)
        self.quarantine, self.prepare, self.count = quarantine, prepare, count
        self.graph, self.collect = graph, collect
        self.parameters, self.max_batch, self.threads, self.device = parameters, max_batch, threads, device
        self.seconds_waiting = 0.0
        self.busy: Callable[[], bool] = lambda: False  # whether the consumer has other work: then no wait is a loss
        self._next = 0  # the next feed to be prepared
        self._ahead: deque[Future[F]] = deque()
        self._running: deque[F] = deque()
        self._readers = ThreadPoolExecutor(min(threads, 4), thread_name_prefix="deitfast-read")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[tuple[F, torch.Tensor, Any] | BaseException] = queue.Queue(_READY)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="deitfast-batches", daemon=True)
        self._pipeline: Any = self._build(self._feed, max_batch)

    def __iter__(self) -> Iterator[tuple[F, torch.Tensor]]:
        """Each feed with its samples on the device, in order on the current stream. Raises what a thread raised."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed; make a new one")
        self._thread.start()
        for _ in range(self.count):
            made = self._next_made()
            self.quarantine.tell()
            if isinstance(made, BaseException):
                raise made
            feed, images, done = made
            if done is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                images.record_stream(current)
            yield feed, images

    def _next_made(self) -> Any:
        """What the thread made next. What of the wait falls into a time when `busy` says no counts as waiting."""
        started: float | None = None
        while True:
            if started is None and not self.busy():
                started = time.perf_counter()
            try:
                made = self._ready.get(timeout=None if started else _TICK_S)
            except queue.Empty:
                continue
            if started:
                self.seconds_waiting += time.perf_counter() - started
            return made

    def close(self) -> None:
        """Stop the threads and free DALI's buffers; further use is an error."""
        self._stop.set()
        if self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()  # for one that waits for room
            self._thread.join()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._running.clear()
        self._pipeline = None

    def _produce(self) -> None:
        """The thread: every batch in turn; what goes wrong is handed to the consumer and ends it."""
        try:
            if self._stream is not None:
                torch.cuda.set_device(self.device)  # else leaving the stream makes a context on GPU 0
            done, failures = 0, 0
            while done < self.count and not self._stop.is_set():
                with torch.cuda.stream(self._stream):  # nothing where there is no stream
                    try:
                        outputs = self._run()
                    except RuntimeError as error:  # DALI's; it names no file and spoils what is in flight
                        failures += 1
                        _raise_unless_of_an_image(error)
                        if not self._mend() and failures > 1:
                            raise self._unexplained(error) from error
                        self._restart(done)
                        continue
                    made = self._finished(outputs)
                done, failures = done + 1, 0
                self._hand_over(made)
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, made: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(made, timeout=_POLL_S)
            except queue.Full:
                continue

    def _run(self) -> Sequence[Any]:
        """DALI's outputs, on a GPU in order on the current stream."""
        return self._pipeline.run() if self._stream is None else self._pipeline.run(self._stream)

    def _finished(self, outputs: Sequence[Any]) -> tuple[F, torch.Tensor, Any]:
        """One batch, and on a GPU the event after which it is there."""
        feed = self._running.popleft()
        images = self.collect(feed, outputs)
        return feed, images, None if self._stream is None else self._stream.record_event()

    def _build(self, source: Callable[[int], tuple[Any, ...]], batch: int, ahead: bool = True) -> Any:
        """A pipeline fed by `source`. ahead: it runs ahead of what it is asked for, so that its errors come early."""
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline: Any = Pipeline(
            batch_size=batch,
            num_threads=self.threads,
            device_id=_device_index(self.device),
            prefetch_queue_depth=_QUEUE if ahead else 1,
            exec_pipelined=ahead,
            exec_async=ahead,
            seed=0,  # nothing in the graph draws
        )
        with pipeline:
            encoded, *rest = fn.external_source(
                source=source,
                num_outputs=1 + self.parameters,
                batch=True,
                dtype=[types.DALIDataType.UINT8] + [types.DALIDataType.INT32] * self.parameters,
            )
            pipeline.set_outputs(*self.graph(encoded, *rest))
        pipeline.build()
        return pipeline

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

    def _restart(self, first: int) -> None:
        """Begin again at feed `first` with a new pipeline: what was in flight is prepared anew."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._running.clear()
        self._next = first
        self._pipeline = self._build(self._feed, self.max_batch)

    def _mend(self) -> bool:
        """Try every image in flight singly; whether one failed, and is now PIL's to decode or quarantined."""
        self._pipeline = None
        wanted = {i: (feed, row) for feed in self._running for row, i in enumerate(feed.distinct.tolist())}
        mended = False
        one: list[Any] = []
        alone: Any = None  # a pipeline of one image, until it fails
        for i, (feed, row) in wanted.items():
            if self._stop.is_set():
                break
            one[:] = [[feed.encoded[row]], *(parameter[row : row + 1] for parameter in feed.parameters)]
            alone = alone or self._build(lambda _: tuple(one), 1, ahead=False)
            try:
                alone.run()
            except RuntimeError as error:
                _raise_unless_of_an_image(error)
                alone, mended = None, True
                self._set_aside(i, " ".join(str(error).split())[:200])
        return mended

    def _set_aside(self, i: int, problem: str) -> None:
        """Have PIL decode image i from now on, or quarantine it where PIL cannot either."""
        try:
            self.quarantine.manifest.rgb(i)
            self.quarantine.decode_by_pil(i)
        except DeitfastError:
            self.quarantine.add(i, f"does not decode: {problem}")

    def _unexplained(self, error: RuntimeError) -> DeitfastError:
        manifest = self.quarantine.manifest
        names = ", ".join(manifest.name(i) for i in self._running[0].distinct[:3].tolist()) if self._running else "?"
        text = " ".join(str(error).split())
        return DeitfastError(f"DALI failed twice on a batch that starts with {names}: {text[:300]}")


def _raise_unless_of_an_image(error: RuntimeError) -> None:
    """Raise DeitfastError for what is no image's fault: DALI's lack of memory, a GPU that answers no more."""
    text = " ".join(str(error).split())
    if _NO_MEMORY.search(text):
        raise DeitfastError(
            "no memory left to decode images. Lower the batch that a process runs at once (--micro-batch, --batch), or "
            f"give --decode cpu. DALI says: {text[:200]}"
        ) from error
    if _NO_GPU.search(text):
        raise DeitfastError(f"the GPU failed while images were decoded. DALI says: {text[:200]}") from error


def dali_version() -> str:
    """Raises ImportError where there is no DALI."""
    import nvidia.dali

    return str(nvidia.dali.__version__)


def check_build(device: torch.device) -> None:
    """Raise DeitfastError where DALI is built for a newer CUDA than the driver of a GPU knows; a CPU needs none."""
    if device.type != "cuda":
        return
    from nvidia.dali import __cuda_version__  # 13.4.92 as 13492

    built, known = int(str(__cuda_version__)[:2]), _cuda_of_driver()
    if known and built > known:
        raise DeitfastError(
            f"DALI is built for CUDA {built} and this machine's driver knows CUDA {known}. Update the driver, or "
            f"install DALI's other build: pip install 'deitfast[cuda{known}]'"
        )


def _cuda_of_driver() -> int:
    """The newest major version of CUDA that the driver knows; 0 where there is no driver to ask."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value // 1000


def _device_index(device: torch.device) -> int | None:
    """DALI's device_id: None builds a pipeline that needs no GPU."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def gathered(outputs: Sequence[Any], row: np.ndarray, output: np.ndarray, device: torch.device) -> torch.Tensor:
    """Sample `row` of DALI's output number `output`, for each of the wanted: uint8 (m, H, W, 3) on the GPU, no wait."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    # The outputs are in order on the current stream, and so are these copies. No DLPack: when a tensor dies that came
    # out of DALI by it, a thread of DALI's calls cudaDeviceSynchronize, which a capture under way does not survive.
    stream = torch.cuda.current_stream(device)
    wholes = [o.as_tensor() for o in outputs]
    dense = torch.empty(len(wholes), *wholes[0].shape(), dtype=torch.uint8, device=device)
    for to, whole in zip(dense, wholes, strict=True):
        feed_ndarray(whole, to, cuda_stream=stream)
    return dense.flatten(0, 1)[to_device(output * dense.shape[1] + row, device)]


# Operators -----------------------------------------------------------------------------------------------------------


def decode(encoded: Any, decoder: str) -> Any:
    """Graph node: whole images, RGB. decoder: gpu (nvJPEG, images on the GPU) or cpu (images on the CPU)."""
    from nvidia.dali import fn

    # Fancy upsampling makes nvJPEG's chroma agree with libjpeg's.
    device = "mixed" if decoder == "gpu" else "cpu"
    return fn.decoders.image(encoded, device=device, adjust_orientation=False, jpeg_fancy_upsampling=True)


def decode_to_gpu(encoded: Any, decoder: str) -> Any:
    """Graph node: whole images, RGB, on the GPU, decoded by `decoder` (gpu or cpu)."""
    images = decode(encoded, decoder)
    return images if decoder == "gpu" else images.gpu()


def decode_crop(encoded: Any, start: Any, shape: Any) -> Any:
    """Graph node: one rectangle of each image, on the CPU, decoding little else."""
    from nvidia.dali import fn

    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], adjust_orientation=False)


def crop(images: Any, start: Any, shape: Any) -> Any:
    """Graph node: the rectangle at `start` (top, left) of `shape` (height, width), pixels."""
    from nvidia.dali import fn

    return fn.slice(images, start=start, shape=shape, axes=[0, 1])


def resize(images: Any, size: Any, interpolation: str = "bicubic") -> Any:
    """Graph node: to `size` (height, width), integers; antialiased, as PIL's filter of that name."""
    from nvidia.dali import fn, types

    if not isinstance(size, list):
        size = fn.cast(size, dtype=types.DALIDataType.FLOAT)  # DALI takes sizes as floats
    kind = {"bicubic": "CUBIC", "bilinear": "LINEAR", "lanczos": "LANCZOS3", "nearest": "NN"}[interpolation]
    return fn.resize(images, size=size, interp_type=getattr(types.DALIInterpType, f"INTERP_{kind}"), antialias=True)


def flip(images: Any, mirrored: Any) -> Any:
    """Graph node: mirrored left to right where `mirrored` is 1."""
    from nvidia.dali import fn

    return fn.flip(images, horizontal=mirrored)
