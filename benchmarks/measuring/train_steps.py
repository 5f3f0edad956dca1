"""One training step of one library, ready to be timed: what the worker processes of `bench_train_step` run.

The step is forward, loss on mixed and smoothed targets, backward, AdamW and the moving average. Peers, and ours with
engine "", run in the loop that one would write in PyTorch: autocast, fused AdamW on CUDA, a foreach average; loss,
optimiser and parameter groups are the same code for all, what differs is the model and how it is run. With another
engine ours is the step that training runs (`deitfast.engine`). The data are random images that already lie on the
device: uint8 for the engine, whose step normalises and mixes them; ready, normalised and mixed, for the loop.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring.harness import Refused, Roofs, measure, roofs, synchronize, timed_row
from benchmarks.measuring.peers_models import build, logits_of, reference_state, version
from benchmarks.measuring.record import clocks
from deitfast.data import Batch, Targets, prepare
from deitfast.data.batch import targets
from deitfast.distributed import World
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import FlatEngine, make_engine
from deitfast.engine.losses import training_loss
from deitfast.engine.optim import Ema, make_optimizer
from deitfast.kernels.loss import mixed_cross_entropy_reference
from deitfast.model.work import CLASSES
from deitfast.model.zoo import find_variant
from deitfast.recipe import Recipe

CHECKED_IMAGES = 4
LIMITS = {"bf16": (2e-3, 1e-2, 3e-2), "fp32": (1e-4, 1e-3, 1e-3), "fp8": (3.2e-2, 0.16, 0.48)}
"""Largest relative error of loss, gradient norm and logits against eager fp32; bf16's own error is near a third.

FP8's 3 bits of mantissa (E4M3) are 4 less than bf16's, so its limits are 16 times as wide."""

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH = {"flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
"""Modules with flash_attn_func(q, k, v), each (batch, tokens, heads, width)."""
OWN = "its own"


@dataclass(frozen=True)
class Job:
    """What one worker runs. model: a zoo name. compile: torch.compile's mode, or "" for eager.

    attention: on a GPU SDPA's backend, FlashAttention in its place, `OWN` where the library has one that it chooses
    itself, or "" for the fastest backend. precision: bf16, fp32, or fp8 of a library that has it.
    engine: graph or flat for a step of `deitfast.engine.engine`, "" for the plain loop.
    launched: `time.time()` when the process was started. quick: few samples.
    """

    library: str
    model: str
    batch: int
    device: str
    precision: str = "bf16"
    fused: bool = False
    ema: bool = True
    drop_path: float = 0.0
    drop_path_form: str = "bernoulli"
    compile: str = ""
    attention: str = ""
    engine: str = ""
    quick: bool = False
    launched: float = 0.0


@dataclass(frozen=True)
class Reference:
    """The first step in eager fp32: loss, 2-norm of all gradients, logits of the first images."""

    loss: float
    gradient_norm: float
    logits: list[list[float]]


class TrainStep:
    """`step()` is one training step in the plain loop; `forward`, `backward` and `update` are its parts."""

    def __init__(self, job: Job) -> None:
        self.job, self.device = job, torch.device(job.device)
        self.model = build(
            job.library, job.model, reference_state(job.model), fused=job.fused, drop_path=job.drop_path,
            fp8=job.precision == "fp8",
        ).to(self.device)  # fmt: skip
        self.prepare()

    def prepare(self) -> None:
        """Data, optimiser and average."""
        self.images, self.targets = prepare(synthetic_batch(self.job), _mixing(self.job))
        self.optimizer = make_optimizer(self.model, Recipe())
        self.ema = Ema(self.model, Recipe().ema_decay) if self.job.ema else None
        self.run: Any = torch.compile(self.model, mode=self.job.compile) if self.job.compile else self.model

    def forward(self) -> tuple[Tensor, Tensor]:
        """(loss, logits)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.precision != "fp32"):
            logits = logits_of(self.run(self.images))
        return soft_cross_entropy(logits, self.targets), logits

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def gradient_norm(self) -> float:
        return gradient_norm(self.model)

    def __call__(self) -> None:
        loss, _ = self.forward()
        self.backward(loss)
        self.update()

    def first(self) -> Reference:
        """The first step, with what is compared."""
        loss, logits = self.forward()
        logits = logits[:CHECKED_IMAGES].detach().float().cpu()
        self.backward(loss)
        norm = self.gradient_norm()
        self.update()
        return Reference(float(loss.detach()), norm, logits.tolist())


class EngineStep(TrainStep):
    """The same with the engine of training: flat buffers and, with engine graph on a GPU, one CUDA graph a step."""

    def prepare(self) -> None:
        job = self.job
        self.recipe = replace(
            _mixing(job), batch=job.batch, engine=job.engine, ema_decay=Recipe().ema_decay if job.ema else 0.0,
            drop_path=job.drop_path, drop_path_form=job.drop_path_form,
        )  # fmt: skip
        engine = make_engine(
            self.model, self.recipe, World(0, 1, 0, self.device), DropPath(self.model, self.recipe, job.batch),
            accumulation=1, bf16=job.precision == "bf16",
        )  # fmt: skip
        assert isinstance(engine, FlatEngine)
        batch = synthetic_batch(job)
        self.engine, self.batch = engine, replace(batch, drop=engine.drop_path.draw(batch))

    def forward(self) -> tuple[Tensor, Tensor]:
        self.engine.flat.zero_grad()
        outputs, _ = self.engine.forward(self.batch)
        return training_loss(outputs, targets(self.batch, self.recipe), self.recipe), logits_of(outputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.engine.flat.gather(first=True)

    def update(self) -> None:
        self.engine.flat.update(torch.from_numpy(self.engine.flat.scalars(self.recipe.lr, 0)).to(self.device))

    def gradient_norm(self) -> float:
        return float(torch.linalg.vector_norm(self.engine.flat.reduced.float()))

    def __call__(self) -> None:
        self.engine(iter([self.batch]), self.engine.steps_run, self.recipe.lr)


def make_train_step(job: Job) -> TrainStep:
    return EngineStep(job) if job.engine else TrainStep(job)


def soft_cross_entropy(logits: Tensor, soft: Targets) -> Tensor:
    """The loss as a loop in eager PyTorch has it, on dense targets."""
    return mixed_cross_entropy_reference(logits.float(), soft.labels, soft.partner_labels, soft.lam, soft.smoothing)


def _mixing(job: Job) -> Recipe:
    """The paper's recipe, without mixing where the images of a batch do not pair."""
    return Recipe() if job.batch % 2 == 0 else replace(Recipe(), mixup=0.0, cutmix=0.0)


def synthetic_batch(job: Job) -> Batch:
    """Random images and mixup draws, on the device; the same on every machine."""
    variant, m = find_variant(job.model), job.batch
    side = variant.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (m, side, side, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (m,), generator=generator)
    lam = torch.rand(m, generator=generator)
    index, view, none = torch.arange(m), torch.zeros(m, dtype=torch.int64), torch.zeros(m, 4, dtype=torch.int64)
    tensors = (t.to(job.device) for t in (images, labels, index, view, none, lam, none.clone()))
    images, labels, index, view, erase, lam, mix_box = tensors
    epoch = torch.zeros(1, dtype=torch.int64, device=job.device)
    return Batch(images, labels, index, view, epoch, erase, lam, mix_box, step=0, slots=np.arange(m))


def gradient_norm(model: torch.nn.Module) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float()))


def reference(job: Job, chunk: int = 32) -> Reference:
    """Loss, gradient norm and logits of our eager model in fp32, accumulated over chunks of the same batch."""
    model = build("ours", job.model, reference_state(job.model), fused=False).to(job.device)
    images, soft = prepare(synthetic_batch(job), _mixing(job))
    total, logits = 0.0, torch.empty(0)
    for start in range(0, job.batch, chunk):
        part = slice(start, start + chunk)
        outputs = model(images[part])
        share = Targets(soft.labels[part], soft.partner_labels[part], soft.lam[part], soft.smoothing)
        loss = soft_cross_entropy(outputs, share) * (len(outputs) / job.batch)
        loss.backward()
        total += float(loss.detach())
        if start == 0:
            logits = outputs[:CHECKED_IMAGES].detach().cpu()
    return Reference(total, gradient_norm(model), logits.tolist())


def compare(actual: Reference, expected: Reference, precision: str) -> None:
    """Raise Refused unless loss, gradient norm and logits agree within `LIMITS`."""
    logits, exact = torch.tensor(actual.logits), torch.tensor(expected.logits)
    if logits.shape != exact.shape:
        raise Refused(f"logits of shape {tuple(logits.shape)}, expected {tuple(exact.shape)}")
    errors = (
        abs(actual.loss - expected.loss) / abs(expected.loss),
        abs(actual.gradient_norm - expected.gradient_norm) / expected.gradient_norm,
        float((logits - exact).norm() / exact.norm()),
    )
    for name, error, limit in zip(("loss", "gradient norm", "logits"), errors, LIMITS[precision], strict=True):
        if not error <= limit:
            raise Refused(f"{name} is off by {error:.1e} relative to eager fp32, limit {limit:.0e} in {precision}")


def fastest_attention(job: Job) -> str:
    """The fastest scaled_dot_product_attention backend, forward and backward, at the model's shape. CUDA only."""
    variant = find_variant(job.model)
    tokens = (variant.image_size // variant.patch_size) ** 2 + 1
    dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
    packed = torch.randn(
        min(job.batch, 64), tokens, 3, variant.heads, variant.width // variant.heads, device=job.device, dtype=dtype
    ).requires_grad_()
    dout = torch.randn_like(packed[:, :, 0].transpose(1, 2))
    times: dict[str, float] = {}
    for name, backend in _BACKENDS.items():

        def run() -> None:
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            F.scaled_dot_product_attention(q, k, v).backward(dout)

        # A backend that does not take this shape, dtype or chip says so with a RuntimeError.
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            times[name] = measure(run, device=job.device, budget_ms=20, flush=False).median_ms
    return min(times, key=lambda name: times[name])


def attention_by(name: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, models compute attention by SDPA's backend, or by FlashAttention, of that name."""
    if name == OWN:
        return contextlib.nullcontext()
    if name in _BACKENDS:
        return sdpa_kernel([_BACKENDS[name], SDPBackend.MATH], set_priority=True)
    flash = importlib.import_module(_FLASH[name]).flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        out = flash(*(x.transpose(1, 2) for x in (query, key, value)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return mock.patch.object(F, "scaled_dot_product_attention", attend)


def work(job: Job, expected: Reference | None) -> dict[str, Any]:
    """Run one job: build, first step, check against `expected` (none with drop-path, whose draws differ), time.

    Returns the row without its key; raises Refused, ImportError, torch.OutOfMemoryError or what the peer raises.
    """
    on_cuda = torch.device(job.device).type == "cuda"
    if job.attention and not on_cuda:
        raise ImportError(f"attention by {job.attention} needs a GPU")
    facts: dict[str, Any] = {"version": version(job.library), "attention": "ours" if job.fused else "default"}
    with contextlib.ExitStack() as stack:
        if on_cuda and not job.fused:
            facts["attention"] = job.attention or fastest_attention(job)
            stack.enter_context(attention_by(facts["attention"]))
        start = time.time()
        step = make_train_step(job)
        synchronize(job.device)
        built = time.time()
        first = step.first()
        synchronize(job.device)
        facts |= {"build_s": built - start, "first_call_s": time.time() - built, "loss": first.loss}
        facts |= {"first_step_s": time.time() - job.launched, "checked": expected is not None}
        if expected is not None:
            compare(first, expected, job.precision)
        if on_cuda:
            for _ in range(2):
                step()
            synchronize(job.device)
            torch.cuda.reset_peak_memory_stats()
        budget, warmup = (500.0, 1) if job.quick else (3000.0, 3)
        # Ways run in processes of their own, minutes apart: the clocks say whether the GPU was the same to them.
        with clocks() as facts["clocks"]:
            runs = [
                measure(step, device=job.device, budget_ms=budget, warmup=warmup, flush=False, most=100)
                for _ in range(1 if job.quick else 2)
            ]
        if on_cuda:
            facts["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            facts["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return {**timed_row({}, runs), **facts}


def measured_roofs(job: Job) -> dict[str, float]:
    return asdict(roofs(job.device, job.quick))


def roof_from(values: Sequence[float]) -> Roofs:
    """`TFLOP/s,GB/s` of the command line."""
    tflops, gbps = values
    return Roofs(tflops, gbps)
