"""One optimisation step, in two engines with one face.

`FlatEngine` is the engine: uint8 images to patches in one kernel, a model whose parameters are views into a flat buffer
(bf16 on a GPU, beside fp32 master weights), gradients gathered in another, loss and gradient reduction on the device,
one optimiser update over the flat buffers. It reads nothing on the host and allocates nothing that outlives it, so on a
GPU the whole of it, accumulation included, is captured as one CUDA graph and replayed; `engine=flat` runs the same code
uncaptured.

`PlainEngine` is the reference it is tested against: DistributedDataParallel, autocast, torch's optimiser.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from deitfast.cuda_graph import capture, on_stream
from deitfast.data.batch import Batch, prepare, prepare_patches, targets, to_device
from deitfast.distributed import World
from deitfast.engine.drop_path import DropPath
from deitfast.engine.flat import FlatState
from deitfast.engine.losses import training_loss
from deitfast.engine.optim import Ema, load_optimizer_tensors, make_optimizer, optimizer_tensors, set_learning_rate
from deitfast.engine.reduction import Reduction
from deitfast.model.deit import DeiT
from deitfast.precision import sum_in_fp32
from deitfast.recipe import Recipe

UNCAPTURED_STEPS = 3
"""Real steps before the capture: kernels compile, cuBLAS and NCCL set themselves up, which a capture must not see."""

_AHEAD = 2  # steps the host may be ahead of the device
_GIVE_UP = 10  # non-finite steps in a row


Teacher = Callable[[Tensor], Tensor]
"""Logits (m, classes) of images (m, 3, S, S) in the student's normalisation."""

Weights = Callable[[], contextlib.AbstractContextManager[None]]
"""What to enter so that the model holds certain weights inside."""


class Engine(ABC):
    """What the loop knows of an engine. description: how it runs, for the log."""

    description: str

    def __init__(
        self, model: DeiT, recipe: Recipe, world: World, drop_path: DropPath, *, accumulation: int, bf16: bool,
        teacher: Teacher | None = None, class_weights: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.world, self.drop_path = model, recipe, world, drop_path
        self.accumulation, self.bf16, self.teacher, self.class_weights = accumulation, bf16, teacher, class_weights
        self.loss_sum, self.skipped_sum = torch.zeros(2, dtype=torch.float64, device=world.device).unbind()
        self.pace = Pace(world.device)
        block: Any
        for block in model.blocks:
            block.recompute = recipe.recompute
        sum_in_fp32()

    @property
    def seconds_for_others(self) -> float:
        """Host time blocked on sums with the other processes so far; a GPU waits for them without the host."""
        return 0.0

    @abstractmethod
    def __call__(self, batches: Iterator[Batch], step: int, lr: float) -> None:
        """Optimisation step number `step` on the next `accumulation` micro-batches."""

    def pop_loss(self) -> tuple[Tensor, Tensor]:
        """fp64 scalars since the last call: this process's share of the summed losses, and steps that were skipped."""
        loss, skipped = self.loss_sum.clone(), self.skipped_sum.clone()
        self.loss_sum.zero_()
        self.skipped_sum.zero_()
        return loss, skipped

    def should_stop(self) -> bool:
        """Whether ten steps in a row were skipped; waits for the device."""
        return False

    @property
    def stems(self) -> tuple[str, ...]:
        """The files that the state takes: model, optim and, where weights are averaged, ema."""
        return ("model", "optim", "ema") if self.recipe.ema_decay else ("model", "optim")

    @abstractmethod
    def tensors(self, *stems: str) -> dict[str, dict[str, Tensor]]:
        """The state by file stem and tensor name, of these stems or of all.

        To be called on every process, together; it is complete on the leading one.
        """

    @abstractmethod
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `tensors`."""

    @abstractmethod
    def broadcast(self) -> None:
        """Give every process the leading one's state."""

    @abstractmethod
    def weights(self) -> contextlib.AbstractContextManager[list[Weights]]:
        """What the model is evaluated with, the present weights and, where they are kept, the averaged ones.

        To be entered by all processes together; what it gives, by each on its own, as often as it likes.
        """

    def busy(self) -> bool:
        """Whether the device has steps left to run."""
        return self.pace.busy()

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Free what must not outlive the process group; no step runs afterwards."""


def make_engine(
    model: DeiT, recipe: Recipe, world: World, drop_path: DropPath, *, accumulation: int, bf16: bool,
    teacher: Teacher | None = None, class_weights: Tensor | None = None,
) -> Engine:  # fmt: skip
    """The engine that `recipe.engine` asks for; auto: graph on a GPU, flat on CPU.

    class_weights: of `training_loss`.
    """
    chosen: type[Engine] = PlainEngine if recipe.engine == "plain" else FlatEngine
    return chosen(
        model, recipe, world, drop_path, accumulation=accumulation, bf16=bf16, teacher=teacher,
        class_weights=class_weights,
    )  # fmt: skip


@contextlib.contextmanager
def _swapped(swap: Callable[[], None]) -> Iterator[None]:
    """Inside is what `swap` exchanges."""
    swap()
    try:
        yield
    finally:
        swap()


class Pace:
    """Holds the host at most `_AHEAD` steps ahead of a GPU: the batches of those steps are alive."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._ends: deque[torch.cuda.Event] = deque()

    def queued(self) -> None:
        """A step has been queued on the current stream: wait for the one `_AHEAD` before it."""
        if not self.on_gpu:
            return
        end = torch.cuda.Event(blocking=True)
        end.record()
        self._ends.append(end)
        if len(self._ends) > _AHEAD:
            self._ends.popleft().synchronize()

    def busy(self) -> bool:
        """Whether the last step has not ended yet."""
        return bool(self._ends) and not self._ends[-1].query()


class PlainEngine(Engine):
    """The reference engine. Its `seconds_for_others` are 0: DistributedDataParallel does not tell."""

    description = "plain loop: DistributedDataParallel, autocast, torch's optimiser"

    def __init__(self, model: DeiT, recipe: Recipe, world: World, drop_path: DropPath, **more: Any) -> None:
        super().__init__(model, recipe, world, drop_path, **more)
        self.optimizer = make_optimizer(model, recipe)
        self.ema = Ema(model, recipe.ema_decay) if recipe.ema_decay else None
        self.trained: nn.Module = model
        if world.size > 1:
            self.trained = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            if world.wire == torch.bfloat16:
                self.trained.register_comm_hook(None, bf16_compress_hook)

    def __call__(self, batches: Iterator[Batch], step: int, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        for micro in range(self.accumulation):
            batch = next(batches)
            reduce_now = self.world.size == 1 or micro == self.accumulation - 1
            with contextlib.nullcontext() if reduce_now else self.trained.no_sync():  # type: ignore[operator]
                images, soft_targets = prepare(batch, self.recipe)
                teacher_logits = self.teacher(images) if self.teacher else None
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                    outputs = self.trained(images, self.drop_path.arrange(self.drop_path.draw(batch)))
                loss = training_loss(outputs, soft_targets, self.recipe, teacher_logits, self.class_weights)
                loss = loss / self.accumulation
                loss.backward()
            self.loss_sum += loss.detach() / self.world.size
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        self.pace.queued()

    def tensors(self, *stems: str) -> dict[str, dict[str, Tensor]]:
        state = {"model": self.model.state_dict(), "optim": optimizer_tensors(self.model, self.optimizer)}
        state |= {"ema": self.ema.tensors} if self.ema else {}
        return {stem: state[stem] for stem in stems or self.stems}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.model, self.optimizer, dict(tensors["optim"]))
        if self.ema:
            self.ema.load(dict(tensors["ema"]))

    def broadcast(self) -> None:
        for tensor in [t for tensors in self.tensors().values() for t in tensors.values()]:
            if tensor.device.type == self.world.device.type:
                self.world.broadcast(tensor)

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[Weights]]:
        averaged = [partial(_swapped, partial(self.ema.swap, self.model))] if self.ema else []
        yield [contextlib.nullcontext, *averaged]


class FlatEngine(Engine):
    """The engine of flat buffers; on a GPU captured as a CUDA graph, unless the recipe asks for `flat`."""

    def __init__(self, model: DeiT, recipe: Recipe, world: World, drop_path: DropPath, **more: Any) -> None:
        super().__init__(model, recipe, world, drop_path, **more)
        device = world.device
        self.captures = device.type == "cuda" and recipe.engine != "flat"
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        in_bf16 = world.wire == torch.bfloat16
        accumulates = self.accumulation > 1 or (world.size > 1 and not in_bf16)
        self.flat = FlatState(model, recipe, self.dtype, accumulates, world)
        self.compute: Any = self.flat.compute_model()
        self.compute.train()
        self.skipped_in_row, self.skipped_most = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        on_cpu = " (CUDA graphs need a GPU)" if device.type == "cpu" else ""
        how = f"one CUDA graph from step {UNCAPTURED_STEPS} on" if self.captures else f"not captured{on_cpu}"
        shared = "" if world.size == 1 else f", each of {world.size} processes updates its share of the weights"
        self.description = f"flat buffers, {how}{shared}{', gradients summed in bf16' if in_bf16 and shared else ''}"
        self.steps_run = 0
        self.reduction = Reduction(self.flat) if world.size > 1 else None
        # Autograd remembers the stream on which a parameter's gradient was first accumulated and makes later ones wait
        # for it: the steps before the capture run on the stream of the capture.
        self._stream = torch.cuda.Stream(device, priority=-1) if self.captures else None  # before the loader's kernels
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[list[Batch], Tensor] | None = None

    @property
    def seconds_for_others(self) -> float:
        return self.reduction.seconds_waiting if self.reduction else 0.0

    def close(self) -> None:  # NCCL does not end while a graph holds its collectives
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._static = None

    def __call__(self, batches: Iterator[Batch], step: int, lr: float) -> None:
        inputs = [self._with_drop_path(next(batches)) for _ in range(self.accumulation)]
        scalars = to_device(self.flat.scalars(lr, step), self.world.device)
        if self.captures and self._graph is None and self.steps_run >= UNCAPTURED_STEPS:
            self._capture(inputs, scalars)
        if self._graph is None or self._static is None:
            with on_stream(self._stream):
                self.run(inputs, scalars)
        else:
            static, static_scalars = self._static
            torch._foreach_copy_([t for s in static for t in s.tensors()], [t for i in inputs for t in i.tensors()])
            static_scalars.copy_(scalars)
            self._graph.replay()
        self.steps_run += 1
        self.pace.queued()

    def _with_drop_path(self, batch: Batch) -> Batch:
        return replace(batch, drop=self.drop_path.draw(batch))

    def run(self, inputs: list[Batch], scalars: Tensor) -> None:
        """The step itself: no host read, no shape that depends on data. scalars: of FlatState.scalars."""
        flat = self.flat
        flat.zero_grad()
        step_loss = torch.zeros((), dtype=torch.float32, device=self.world.device)
        for micro, one in enumerate(inputs):
            last = micro == len(inputs) - 1
            if self.reduction:
                self.reduction.begin(active=last, first=micro == 0)
            loss = self.loss(one) / (self.accumulation * self.world.size)
            loss.backward()
            step_loss += loss.detach()
            if not (self.reduction and last):
                flat.gather(first=micro == 0)
        if self.reduction:
            self.reduction.wait()
        flat.update(scalars)
        finite = torch.isfinite(flat.norm)
        self.loss_sum += torch.where(finite, step_loss, 0.0)
        self.skipped_sum += ~finite
        self.skipped_in_row.copy_(torch.where(finite, 0.0, self.skipped_in_row + 1))
        torch.maximum(self.skipped_most, self.skipped_in_row, out=self.skipped_most)

    def forward(self, batch: Batch) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        """The model's outputs for a micro-batch, and the teacher's logits."""
        patches_BPK = prepare_patches(batch, self.recipe, self.model.patch_size, self.dtype)
        teacher_logits = None
        if self.teacher:  # first: what it takes is free again when the student's activations come
            patch = self.model.patch_size
            side = self.model.image_size // patch
            images = rearrange(patches_BPK, "b (y x) (c p q) -> b c (y p) (x q)", y=side, c=3, p=patch)
            teacher_logits = self.teacher(images)
        return self.compute(patches_BPK, self.drop_path.arrange(batch.drop)), teacher_logits

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch, fp32 scalar."""
        outputs, teacher_logits = self.forward(batch)
        return training_loss(outputs, targets(batch, self.recipe), self.recipe, teacher_logits, self.class_weights)

    def should_stop(self) -> bool:
        return self.skipped_most.item() >= _GIVE_UP

    def tensors(self, *stems: str) -> dict[str, dict[str, Tensor]]:
        self.flat.complete()
        makers: dict[str, Callable[[], dict[str, Tensor]]] = {
            "model": self.model.state_dict, "optim": self.flat.optimizer_tensors, "ema": self.flat.ema_tensors
        }  # fmt: skip
        return {stem: makers[stem]() for stem in stems or self.stems}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model.load_state_dict(tensors["model"])
        self.flat.load_optimizer_tensors(dict(tensors["optim"]))
        if self.flat.ema is not None:
            self.flat.load_ema(dict(tensors["ema"]))
        self.flat.refresh()
        for counter in (self.skipped_in_row, self.skipped_most):
            counter.zero_()

    def broadcast(self) -> None:
        self.flat.broadcast()

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[Weights]]:
        self.flat.complete()
        found: list[Weights] = [contextlib.nullcontext]
        if self.flat.ema is not None:
            found.append(partial(_swapped, partial(self.flat.swap, self.flat.averages())))
        yield found

    def _capture(self, inputs: list[Batch], scalars: Tensor) -> None:
        """Record the step into a graph; it does not run yet."""
        self._static = [one.clone() for one in inputs], scalars.clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has a memory pool of its own
        self._graph, _ = capture(partial(self.run, *self._static), self._stream)
