"""An op with fresh random tensors, what it should give, and what is wrong with what it gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deitfast.kernels.catalogue import Draw, Inputs, Op, Shape, Tensors
from deitfast.verification.judgement import GRADIENT, OUTPUT, problem

_CHUNK = 1 << 23
"""Values of the stream in a part of the batch that is computed in float64 at once: some gigabytes with all between."""


@dataclass(frozen=True)
class Case:
    """An op with tensors to run it on. dout: gradient of its output; None: its forward alone is of interest.

    dtype: of what is computed. drawn: `draw`'s keywords, of which another process makes its like.
    """

    op: Op
    shape: Shape
    tensors: Tensors
    options: Mapping[str, Any]
    dout: Tensor | None
    dtype: torch.dtype
    drawn: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

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
        dout = None
        if differentiable:
            out = op.out(shape)
            dout = draw.normal(*out) if out else torch.ones((), device=draw.device)
        drawn: dict[str, Any] = {"backward": backward, "without": without, "subset": subset}
        return cls(op, shape, tensors, options, dout, draw.dtype, drawn)

    def run(self, function: Callable[..., Tensor | Tensors], tensors: Tensors | None = None) -> Tensors:
        """What `function` gives and, with `dout`, the gradient of every input that gets one."""
        leaves = {}
        for name, x in (self.tensors if tensors is None else tensors).items():
            wants = self.dout is not None and x.is_floating_point() and name not in self.op.constants
            leaves[name] = x.detach().requires_grad_(wants)
        with torch.set_grad_enabled(self.dout is not None):
            out = function(**leaves, **self.options)
        if not isinstance(out, Tensor):
            return out
        found = {"output": out.detach()}
        if self.dout is not None:
            wanting = [name for name, x in leaves.items() if x.requires_grad]
            gradients = torch.autograd.grad(out, [leaves[name] for name in wanting], self.dout.to(out.dtype))
            found |= {f"gradient of {name}": x for name, x in zip(wanting, gradients, strict=True)}
        return found

    def exact(self) -> Tensors:
        """`run` of the reference in float64, where samples stand for themselves a part of the batch at a time.

        Of integers: on the host.
        """
        if self.op.exact:
            found = self.run(self.op.reference, {name: x.cpu() for name, x in self.tensors.items()})
            return {name: x.to(self.device) for name, x in found.items()}
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
            factor = GRADIENT if name.startswith("gradient of ") else OUTPUT
            if why := problem(name, x, self.exact[name], self.eager[name].to(x.dtype), factor):
                return why
        return ""
