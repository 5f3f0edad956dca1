"""A CUDA graph played on the pretended device: a capture is recorded op by op and refuses what CUDA or torch refuse.

As on a GPU nothing has run when a capture ends: memory that was there before is put back, what the capture made is
poisoned with NaN. A replay runs the recorded ops on the recorded tensors.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.rehearsal.memory import PINNED, on_host

# Ops that wait for the device, or whose shape depends on data.
_WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::is_nonzero", "aten::equal", "aten::repeat_interleave.Tensor",
    "aten::item", "aten::_pin_memory",
}  # fmt: skip


class CaptureError(RuntimeError):
    """What CUDA or torch would refuse during a capture."""


@dataclass
class Recorded:
    """One op of a graph: `call` runs it again; `outputs` are its tensors, `made` those in memory of their own."""

    name: str
    call: Callable[[], Any]
    outputs: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Notes ops below autograd while it is on: in the thread that captures and in autograd's, which inherits it."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.thread, self.mode = threading.get_ident(), mode
        self.ops: list[Recorded] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.invalid = ""  # why another thread's call has broken this capture
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by address: older memory and what it held
        self._fresh: set[int] = set()  # addresses that the capture made
        self._alive: list[Any] = []  # an address must not come back as another tensor's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such ops arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        _refuse(func.name(), tensors, kwargs.get("device"))
        written = _written(func, args, kwargs)
        self._keep(written)
        out = func(*args, **kwargs)
        # Not the tensors themselves: autograd takes a gradient over, without a copy, where nobody else holds it.
        outputs = [x.detach() for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_cuda for x in (*tensors, *outputs)):
            known = {_address(x) for x in tensors}
            made = [x for x in outputs if _address(x) not in known]
            self._fresh |= {_address(x) for x in made}
            self._alive.append(outputs)
            self.counts[func.name()] += 1
            if made or written:
                self.ops.append(Recorded(func.name(), lambda: func(*args, **kwargs), outputs, made))
        return out

    def record(self, name: str, call: Callable[[], Any], written: Sequence[Tensor]) -> None:
        """Run and note a call that the dispatcher does not see, with the tensors that it writes."""
        self._keep(written)
        self.counts[name] += 1
        self.ops.append(Recorded(name, call))
        with _disable_current_modes():
            call()

    def put_back(self) -> None:
        """Leave memory as it is after a capture."""
        for whole, before in self._before.values():
            on_host(whole).copy_(before)
        for made in (x for op in self.ops for x in op.made):
            if made.is_cuda and made.is_floating_point():
                on_host(made).fill_(float("nan"))

    def replay(self) -> None:
        for op in self.ops:
            again = [x for x in tree_leaves(op.call()) if isinstance(x, Tensor)]
            for kept, new in zip(op.outputs, again, strict=True):
                if any(kept is made for made in op.made):
                    on_host(kept).copy_(on_host(new))

    def _keep(self, written: Sequence[Tensor]) -> None:
        for x in written:
            storage = x.untyped_storage()
            if _address(x) in self._fresh or _address(x) in self._before or not storage.nbytes():
                continue
            whole = torch.empty(0, dtype=torch.uint8, device=x.device)
            whole.set_(storage, 0, (storage.nbytes(),), (1,))
            self._before[_address(x)] = whole, on_host(whole).clone()


ACTIVE: list[Recorder] = []
"""The capture under way, if there is one."""

REPLAYED: list[CUDAGraph] = []
"""The graph that is being replayed, if one is."""


def refuse_in_capture(what: str) -> None:
    """Raise where CUDA would not let this thread call `what`, because a capture is under way."""
    for capture in ACTIVE:
        if capture.thread == threading.get_ident() or capture.mode == "global":
            raise CaptureError(f"CUDA error: operation not permitted when stream is capturing ({what})")


def _refuse(name: str, tensors: list[Tensor], device: Any) -> None:
    on = {x.device.type for x in tensors}
    if name in _WAITS and "cuda" in on:
        raise CaptureError(f"CUDA error: operation not permitted when stream is capturing ({name} waits)")
    if name == "aten::index.Tensor" and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:]):
        raise CaptureError(f"CUDA error: operation not permitted when stream is capturing ({name} with a mask)")
    elsewhere = name == "aten::_to_copy" and device is not None and torch.device(device).type not in on
    if elsewhere or (on == {"cpu", "cuda"} and name in ("aten::copy_", "aten::_copy_from")):
        host = next((x for x in tensors if x.device.type == "cpu"), None)
        if host is None or host.data_ptr() not in PINNED:
            raise CaptureError(
                "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned "
                f"({name} of {tuple(tensors[0].shape)})"
            )
    elif "cuda" in on and any(x.device.type == "cpu" and x.dim() for x in tensors):
        raise CaptureError(f"{name} mixes CPU and CUDA tensors")


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class CUDAGraph:
    """Plays torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.recorder: Recorder | None = None
        self.replays = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if ACTIVE:
            raise CaptureError("a capture is under way already")
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            raise CaptureError("CUDA graphs must be captured on a non-default stream")
        self.recorder = Recorder(capture_error_mode)
        ACTIVE.append(self.recorder)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        assert self.recorder is not None
        self.recorder.__exit__(None, None, None)
        ACTIVE.clear()
        self.recorder.put_back()
        if self.recorder.invalid:
            raise CaptureError(
                f"CUDA error: operation failed due to a previous error during capture ({self.recorder.invalid})"
            )

    @torch.no_grad()
    def replay(self) -> None:
        assert self.recorder is not None, "replayed after reset(), or before a capture"
        self.replays += 1
        REPLAYED.append(self)
        self.recorder.replay()
        REPLAYED.clear()

    def reset(self) -> None:
        self.recorder = None

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class graph:
    """Plays torch.cuda.graph: the same calls in the same order."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        self.cuda_graph, self.pool, self.mode = cuda_graph, pool, capture_error_mode
        self.on_stream = torch.cuda.stream(torch.cuda.Stream() if stream is None else stream)

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.on_stream.__enter__()
        self.cuda_graph.capture_begin(self.pool, self.mode)

    def __exit__(self, *error: Any) -> None:
        self.cuda_graph.capture_end()
        self.on_stream.__exit__(*error)
