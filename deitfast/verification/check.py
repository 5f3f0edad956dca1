"""One op on this device: is it right, repeatable, inside its memory, fit for a CUDA graph; which form is fastest?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deitfast.cuda_graph import capture
from deitfast.errors import first_line
from deitfast.kernels.catalogue import Draw, Inputs, Op, Shape, Tensors
from deitfast.kernels.replaced import CUDNN, EAGER, OURS, chosen
from deitfast.verification.arena import Arena
from deitfast.verification.judgement import GRADIENT, OUTPUT, problem
from deitfast.verification.timing import fastest, milliseconds
from deitfast.verification.verdict import SLOWER, OpVerdict

_CHUNK = 1 << 23
"""Values of the stream in a part of the batch that is computed in float64 at once: some gigabytes with all between."""
_WITH_ATTENTION = ("attention", "layernorm_attention")


@dataclass(frozen=True)
class Case:
    """An op with tensors to run it on. dout: gradient of its output; None: its forward alone is of interest."""

    op: Op
    shape: Shape
    tensors: Tensors
    options: Mapping[str, Any]
    dout: Tensor | None

    @classmethod
    def draw(
        cls, op: Op, shape: Shape, draw: Draw, *, backward: bool, without: frozenset[str] = frozenset(), subset: int = 0
    ) -> Case:
        """Fresh tensors. without: optional ones that are left out. subset: samples of a branch that runs for some."""
        inputs: Inputs = dict(op.inputs(draw, shape))
        options = dict(op.options(shape))
        if subset and "path_scale" in inputs:
            order = torch.rand(shape.batch, generator=draw.generator, device=draw.device).argsort()
            inputs["subset"], options["subset_scale"] = order[:subset].sort().values, shape.batch / subset
        dropped = without | {"path_scale"} if "subset" in inputs else without
        tensors = {name: x for name, x in inputs.items() if x is not None and name not in dropped}
        differentiable = backward and any(name not in op.constants for name in tensors)
        out = op.out(shape)
        dout = draw.normal(*out) if out else torch.ones((), device=draw.device)
        return cls(op, shape, tensors, options, dout if differentiable else None)

    def run(self, function: Callable[..., Tensor], tensors: Tensors | None = None) -> Tensors:
        """The output of `function` and, with `dout`, the gradient of every input that gets one."""
        leaves = {}
        for name, x in (self.tensors if tensors is None else tensors).items():
            wants = self.dout is not None and x.is_floating_point() and name not in self.op.constants
            leaves[name] = x.detach().requires_grad_(wants)
        with torch.set_grad_enabled(self.dout is not None):
            out = function(**leaves, **self.options)
        found = {"output": out.detach()}
        if self.dout is not None:
            wanting = [name for name, x in leaves.items() if x.requires_grad]
            gradients = torch.autograd.grad(out, [leaves[name] for name in wanting], self.dout.to(out.dtype))
            found |= {f"gradient of {name}": x for name, x in zip(wanting, gradients, strict=True)}
        return found

    def exact(self) -> Tensors:
        """`run` of the reference in float64, where samples stand for themselves a part of the batch at a time."""
        per_sample = self.op.per_sample & self.tensors.keys()
        size = max(2, _CHUNK // (self.shape.tokens * self.shape.width) // 2 * 2)
        if not per_sample or size >= self.shape.batch:
            return _doubled(self).run(self.op.reference)
        parts = [self._part(start, start + size).exact() for start in range(0, self.shape.batch, size)]
        of_samples = {"output", *(f"gradient of {name}" for name in per_sample)}
        return {
            name: torch.cat([part[name] for part in parts])
            if name in of_samples
            else torch.stack([part[name] for part in parts]).sum(0)
            for name in parts[0]
        }

    def _part(self, start: int, stop: int) -> Case:
        stop = min(stop, self.shape.batch)
        tensors = {name: x[start:stop] if name in self.op.per_sample else x for name, x in self.tensors.items()}
        if "subset" in tensors:
            samples = tensors["subset"]
            tensors["subset"] = samples[(samples >= start) & (samples < stop)] - start
        dout = None if self.dout is None else self.dout[start:stop]
        return replace(self, shape=replace(self.shape, batch=stop - start), tensors=tensors, dout=dout)


def _doubled(case: Case) -> Case:
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    return replace(case, tensors=wide, dout=None if case.dout is None else case.dout.double())


@dataclass(frozen=True)
class Expected:
    """What a case should give: in float64, and by eager PyTorch in its own dtype."""

    exact: Tensors
    eager: Tensors

    def problem(self, found: Tensors) -> str:
        """The first thing in `found` that is wrong, in words."""
        for name, x in found.items():
            factor = OUTPUT if name == "output" else GRADIENT
            if why := problem(name, x, self.exact[name], self.eager[name].to(x.dtype), factor):
                return why
        return ""


def check(
    op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, timed: bool = True, **of_case: Any
) -> OpVerdict:
    """What there is to say of `op` at `shape`; with half the batch where the GPU's memory does not suffice.

    timed: a right op's fastest form, not just itself. of_case: keywords of `Case.draw`.
    """
    try:
        case = Case.draw(op, shape, Draw(seed, dtype, device), **of_case)
        other = Case.draw(op, shape, Draw(seed + 1, dtype, device), **of_case)
        with chosen():
            expected = Expected(case.exact(), case.run(op.reference))
            why = _attempt(lambda: _wrong(case, other, expected))
        if why:
            return OpVerdict(op.name, EAGER, why, seed=seed)
        if not timed or device.type != "cuda":
            return OpVerdict(op.name, seed=seed)
        return _timed(case, expected, device, seed)
    except torch.OutOfMemoryError:
        if shape.batch < 4:
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    half = {**of_case, "subset": of_case.get("subset", 0) // 2}
    return check(op, replace(shape, batch=shape.batch // 4 * 2), dtype, device, seed, timed, **half)


def _attempt(question: Callable[[], str]) -> str:
    """The answer, or how the op failed to run."""
    try:
        return question()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of its compiler, of CUDA: whatever it is, the op does not run here
        does = "does not compile" if type(error).__module__.startswith("triton.compiler") else "raises"
        return f"it {does}: {type(error).__name__}: {first_line(error)}"


def _wrong(case: Case, other: Case, expected: Expected) -> str:
    """What is wrong with an op, in words; empty where nothing is."""
    device = case.tensors[next(iter(case.tensors))].device
    arena = Arena(device)
    placed = {name: arena.place(x) for name, x in case.tensors.items()}
    with arena.allocating():
        first, second = ({name: x.clone() for name, x in case.run(case.op.function, placed).items()} for _ in range(2))
    if arena.touched():
        return "it writes outside of its tensors"
    for name, x in placed.items():
        if not torch.equal(x, case.tensors[name]):
            return f"it changes its input {name}"
    if why := expected.problem(first):
        return why
    for name, x in first.items():
        if not torch.equal(x, second[name]):
            return f"{name}: a second call gives {int((x != second[name]).sum())} other values"
    return _wrong_in_graph(other, case, expected) if device.type == "cuda" else ""


def _wrong_in_graph(recorded: Case, replayed: Case, expected: Expected) -> str:
    """What is wrong when the op is captured on some values and replayed on others."""
    device = recorded.tensors[next(iter(recorded.tensors))].device
    graph, found = capture(partial(recorded.run, recorded.op.function), device=device)
    for name, x in recorded.tensors.items():
        x.copy_(replayed.tensors[name])
    if recorded.dout is not None and replayed.dout is not None:
        recorded.dout.copy_(replayed.dout)
    graph.replay()
    why = expected.problem(found)
    graph.reset()
    return f"replayed in a CUDA graph, {why}" if why else ""


def _timed(case: Case, expected: Expected, device: torch.device, seed: int) -> OpVerdict:
    """The verdict on an op that is right: its fastest form, and ours where none is faster beyond noise."""

    def of_form(form: str) -> Tensors:
        with chosen(**{case.op.name: form}):
            return case.run(case.op.function)

    def problem_of(form: str) -> str:
        return expected.problem(of_form(form))

    forms = [EAGER, CUDNN] if case.op.name in _WITH_ATTENTION else [EAGER]
    right = [OURS, *(form for form in forms if not _attempt(partial(problem_of, form)))]
    times = milliseconds({form: partial(of_form, form) for form in right}, device)
    best, ms = fastest(times, OURS), {form: statistics.median(found) for form, found in times.items()}
    why = "" if best == OURS else f"{SLOWER}: {ms[OURS]:.3f} ms, {best} {ms[best]:.3f} ms"
    return OpVerdict(case.op.name, best, why, ms, seed)
