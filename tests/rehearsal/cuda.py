"""Plays torch.cuda on the pretended device: what the project calls of it, with the rules that matter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.rehearsal.memory import DEVICE, PINNED, contexts, pin  # before torch

import torch  # isort: skip

from tests.rehearsal import capture
from tests.rehearsal.capture import refuse_in_capture

TOTAL_BYTES = 85_520_809_984
PROPERTIES = SimpleNamespace(
    total_memory=TOTAL_BYTES, L2_cache_size=50 << 20, name="Pretended H100", major=9, minor=0,
    multi_processor_count=132, uuid="0",
)  # fmt: skip
MEMORY = {"free": 84_900_000_000, "cached": 0}
"""What mem_get_info says is free, and what torch holds of the rest without using it, in bytes."""

EVENTS: list[tuple[str, int, int, str]] = []
"""(what, stream, event or other stream, thread) of every order between streams, in the order of the calls."""

MADE_BY: list[tuple[int, str]] = []
"""(device, thread) of each context that set_stream made."""


class Stream:
    """Plays torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int | None = None, **_: Any) -> None:
        self.device_index = _index(device)
        self.stream_id = DEVICE.stream_new() if stream_id is None else stream_id
        self.priority, self.device = priority, torch.device("cuda", self.device_index)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((self.stream_id, self.device_index))

    def wait_stream(self, other: Stream) -> None:
        _note("wait_stream", self.stream_id, other.stream_id)

    def wait_event(self, event: Event) -> None:
        _note("wait_event", self.stream_id, event.number)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        refuse_in_capture("cudaStreamSynchronize")


class Event:
    """Plays torch.cuda.Event."""

    made = 0

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        Event.made += 1
        self.number, self.stream_id = Event.made, -1

    def record(self, stream: Stream | None = None) -> None:
        self.stream_id = (stream or current_stream()).stream_id
        _note("record", self.stream_id, self.number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        refuse_in_capture("cudaEventSynchronize")
        _note("synchronize", self.stream_id, self.number)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    return Stream(index, stream_id=DEVICE.stream_get(index))


def set_stream(stream: Stream | None) -> None:
    if stream is None:
        return
    before = set(contexts())
    DEVICE.stream_set(stream.stream_id, stream.device_index)
    MADE_BY.extend((device, threading.current_thread().name) for device in set(contexts()) - before)


def install() -> None:
    """Put all of this in place of torch.cuda, for the rest of the process."""
    import torch._dynamo  # it looks for more of CUDA than there is here, while it is imported

    torch._C._cuda_getCurrentRawStream = lambda index: DEVICE.stream_get(index)
    always: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "_is_compiled": True, "is_bf16_supported": True,
        "_is_in_bad_fork": False, "_lazy_init": None, "manual_seed": None, "manual_seed_all": None,
        "get_device_properties": PROPERTIES, "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
    }  # fmt: skip
    made: dict[str, Callable[..., Any]] = {name: _constant(value) for name, value in always.items()}
    made |= {
        "device_count": DEVICE.device_count,
        "current_device": DEVICE.device_get,
        "set_device": lambda device: DEVICE.device_set(_index(device)),
        "_exchange_device": DEVICE.device_exchange,
        "_maybe_exchange_device": DEVICE.device_maybe_exchange,
        "_get_device_index": lambda device, optional=False, allow_cpu=False: _index(device),
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(device, stream_id=0),
        "set_stream": set_stream,
        "CUDAGraph": capture.CUDAGraph,
        "graph": capture.graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: bool(capture.ACTIVE),
        "synchronize": lambda device=None: refuse_in_capture("cudaDeviceSynchronize"),
        "empty_cache": lambda: refuse_in_capture("cudaFree"),
        "mem_get_info": lambda device=None: (MEMORY["free"], TOTAL_BYTES),
    }
    made |= {
        "memory_allocated": lambda device=None: DEVICE.bytes_allocated(),
        "max_memory_allocated": lambda device=None: DEVICE.bytes_peak(),
        "memory_reserved": lambda device=None: DEVICE.bytes_allocated() + MEMORY["cached"],
        "max_memory_reserved": lambda device=None: DEVICE.bytes_peak() + MEMORY["cached"],
        "reset_peak_memory_stats": lambda device=None: DEVICE.bytes_reset_peak(),
    }
    for name, value in made.items():
        setattr(torch.cuda, name, value)
    for module, names in ((torch.cuda.streams, ("Stream", "Event")), (torch.cuda.graphs, ("CUDAGraph", "graph"))):
        for name in names:
            setattr(module, name, made[name])
    tensor: Any = torch.Tensor
    tensor.pin_memory = pin
    tensor.is_pinned = lambda self, device=None: self.data_ptr() in PINNED
    tensor.record_stream = lambda self, stream: _note("record_stream", stream.stream_id, 0)
    torch.Generator = _generator_class()  # type: ignore[misc]
    DEVICE.device_exchange(0)


def _generator_class() -> type:
    """torch.Generator, which on the pretended device is the CPU's: its kernels draw."""
    original = torch.Generator

    class Generator(original):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return original("cpu" if torch.device(device).type == "cuda" else device)

    return Generator


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return DEVICE.device_get() if index is None else index


def _note(what: str, stream: int, other: int) -> None:
    EVENTS.append((what, stream, other, threading.current_thread().name))
