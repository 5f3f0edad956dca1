"""Where `benchmarks.tune` searches: each kernel at each DeiT shape. The entries to try are what the package offers.

A site compares with eager PyTorch in the same dtype and in float64; its `call` runs one kernel (two for the looping
attention backward) through the package's own launcher, so that what is tuned is what will run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.compile_report import Case, cases_of
from deitfast.kernels import attention_op, gemm, layernorm
from deitfast.kernels.catalogue import MODELS, Draw, Shape, Tensors
from deitfast.kernels.common import record
from deitfast.kernels.tunable import Pick, Selection, picked, selection

EPS = 1e-6


@dataclass(frozen=True)
class Site:
    """One kernel at one shape.

    selection: the package's choice that is searched, for an architecture: what it uses now, and the entries to try.
    call, eager: inputs -> results, by the kernel and in PyTorch; eager also serves in float64. rival: what eager is,
    where it does no more than the kernel must, so that its time counts too.
    """

    name: str
    op: str
    shape: Shape
    selection: Callable[[int], Selection]
    inputs: Callable[[Draw, Shape], Tensors]
    call: Callable[[Tensors], tuple[Tensor, ...]]
    eager: Callable[[Tensors], tuple[Tensor, ...]]
    factor: float = 2.0
    rival: str = ""

    def candidates(self, arch: int) -> list[Pick]:
        """The current entry first, then those to try."""
        found = self.selection(arch)
        return [found.own, *found.space]

    def apply(self, arch: int, candidate: Pick) -> contextlib.AbstractContextManager[None]:
        """Inside, the package uses the candidate."""
        return picked({self.selection(arch).name: candidate})

    def cases(self, arch: int) -> list[Case]:
        """The kernels that must compile: those which `call` launches while a candidate is applied."""
        with FakeTensorMode(), record(arch) as launches:
            # Few samples, of a number that is a multiple of 16 as is that of the measurement.
            inputs = self.inputs(Draw(0, torch.bfloat16, "cpu"), replace(self.shape, batch=16))
            launches.clear()
            self.call(inputs)
        return cases_of(launches, arch)


def _wide(x: Tensor) -> Tensor:
    """For a result that the kernel keeps in fp32: at least fp32."""
    return x if x.dtype == torch.float64 else x.float()


# Attention -----------------------------------------------------------------------------------------------------------


def _attention_site(kernel: str, model: str, tokens: int, batch: int) -> Site:
    shape = Shape.of(model, tokens, batch)
    scale = (shape.width // shape.heads) ** -0.5
    backward = kernel.startswith("bwd")

    def inputs(draw: Draw, shape: Shape) -> Tensors:
        qkv = draw.activations(*shape.leading, 3 * shape.width)
        if not backward:
            return {"qkv": qkv}
        out, lse = attention_op.attention_fwd_op(qkv, shape.heads, scale)
        return {"qkv": qkv, "out": out, "lse": lse, "dout": draw.activations(*shape.leading, shape.width)}

    def call(t: Tensors) -> tuple[Tensor, ...]:
        if not backward:
            return (attention_op.attention_fwd_op(t["qkv"], shape.heads, scale)[0],)
        return (attention_op.attention_bwd_op(t["dout"], t["qkv"], t["out"], t["lse"], shape.heads, scale),)

    def eager(t: Tensors) -> tuple[Tensor, ...]:
        if not backward:
            return (attention_op.attention_reference(t["qkv"], shape.heads),)
        with torch.enable_grad():
            qkv = t["qkv"].detach().requires_grad_()
            out = attention_op.attention_reference(qkv, shape.heads)
            return torch.autograd.grad(out, qkv, t["dout"])

    return Site(
        name=f"attention {kernel} {shape}",
        op="attention",
        shape=shape,
        selection=lambda arch: selection(attention_op.attention_launch, arch, kernel, 2, 64),
        inputs=inputs,
        call=call,
        eager=eager,
        factor=3.0 if backward else 2.0,
    )


# Matrix products -----------------------------------------------------------------------------------------------------


def _linear_site(stage: str, model: str, outputs: int, inputs: int, batch: int) -> Site:
    """stage: linear, residual, gelu or gelu_grad; outputs, inputs: in widths of the model."""
    shape = Shape.of(model, 197, batch)
    N, K = outputs * shape.width, inputs * shape.width
    epilogue = "linear" if stage == "residual" else stage

    def make(draw: Draw, shape: Shape) -> Tensors:
        tensors = {"a": draw.normal(shape.rows, K)}
        if stage == "gelu_grad":
            return tensors | {"weight": draw.normal(K, N, std=K**-0.5), "derivative": draw.normal(shape.rows, N)}
        tensors |= draw.linear("", N, K)
        if stage == "residual":
            tensors |= {"residual": draw.normal(shape.rows, N), "path_scale": draw.path_scale(shape.batch)}
        return tensors

    def call(t: Tensors) -> tuple[Tensor, ...]:
        if stage == "gelu_grad":
            return gemm.linear_gelu_bwd(t["a"], t["weight"], t["derivative"])
        if stage == "gelu":
            return gemm.linear_gelu_fwd(t["a"], t["weight"], t["bias"], save=True)
        if stage == "residual":
            return (gemm.linear_residual_fwd(t["a"], t["weight"], t["bias"], t["residual"], None, t["path_scale"]),)
        return (gemm.linear_fwd(t["a"], t["weight"], t["bias"]),)

    def eager(t: Tensors) -> tuple[Tensor, ...]:
        if stage == "gelu_grad":
            dh = (t["a"] @ t["weight"]) * t["derivative"]
            return dh, _wide(dh).sum(0)
        h = F.linear(t["a"], t["weight"], t["bias"])
        if stage == "gelu":
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                return F.gelu(h), torch.autograd.grad(F.gelu(leaf).sum(), leaf)[0]
        if stage == "residual":
            path_scale = t["path_scale"].to(h.dtype).repeat_interleave(h.shape[0] // t["path_scale"].numel())
            return (t["residual"] + h * path_scale[:, None],)
        return (h,)

    return Site(
        name=f"gemm {stage} {shape} N={N} K={K}",
        op="gemm",
        shape=shape,
        selection=lambda arch: selection(gemm.linear_launch, arch, 2, N, K, epilogue, True),
        inputs=make,
        call=call,
        eager=eager,
        factor=3.0 if stage == "gelu_grad" else 2.0,
        rival="cuBLAS with its bias epilogue" if stage == "linear" else "",
    )


def _sum_site(model: str, batch: int) -> Site:
    shape = Shape.of(model, 197, batch)

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return gemm.scale_and_sum(t["dout"], t["dout"].dtype, t["gamma"], t["path_scale"])

    def eager(t: Tensors) -> tuple[Tensor, ...]:
        branch = t["dout"] * t["path_scale"].to(t["dout"].dtype).repeat_interleave(shape_rows(t))[:, None]
        return branch, branch * t["gamma"], _wide(branch).sum(0)

    def shape_rows(t: Tensors) -> int:
        return t["dout"].shape[0] // t["path_scale"].numel()

    return Site(
        name=f"scale_and_sum {shape}",
        op="scale_and_sum",
        shape=shape,
        selection=lambda arch: selection(gemm.sums_launch, shape.width),
        inputs=lambda draw, s: {
            "dout": draw.normal(s.rows, s.width),
            "gamma": draw.gamma(s.width),
            "path_scale": draw.path_scale(s.batch),
        },
        call=call,
        eager=eager,
        factor=3.0,
    )


# LayerNorm -----------------------------------------------------------------------------------------------------------


def _layernorm_site(stage: str, model: str, batch: int) -> Site:
    shape = Shape.of(model, 197, batch)
    backward = stage == "bwd"

    def make(draw: Draw, s: Shape) -> Tensors:
        tensors = {"x": draw.normal(s.rows, s.width)} | draw.norm("ln", s.width)
        if backward:
            _, mean, rstd = layernorm.layernorm_fwd(
                tensors["x"], tensors["ln_weight"], tensors["ln_bias"], EPS, draw.dtype
            )
            tensors |= {
                "mean": mean,
                "rstd": rstd,
                "dout": draw.normal(s.rows, s.width),
                "dres": draw.normal(s.rows, s.width),
            }
        return tensors

    def call(t: Tensors) -> tuple[Tensor, ...]:
        if backward:
            return layernorm.layernorm_bwd(t["dout"], t["x"], t["ln_weight"], t["mean"], t["rstd"], t["dres"])
        return (layernorm.layernorm_fwd(t["x"], t["ln_weight"], t["ln_bias"], EPS, t["x"].dtype)[0],)

    def eager(t: Tensors) -> tuple[Tensor, ...]:
        if not backward:
            return (F.layer_norm(t["x"], t["x"].shape[-1:], t["ln_weight"], t["ln_bias"], EPS),)
        with torch.enable_grad():
            leaves = [t[name].detach().requires_grad_() for name in ("x", "ln_weight", "ln_bias")]
            out = F.layer_norm(leaves[0], leaves[0].shape[-1:], leaves[1], leaves[2], EPS)
            dx, dweight, dbias = torch.autograd.grad(out, leaves, t["dout"])
        return dx + t["dres"], dweight, dbias

    return Site(
        name=f"layernorm_{stage} {shape}",
        op="layernorm",
        shape=shape,
        selection=lambda arch: selection(layernorm.layernorm_launch, stage, shape.width),
        inputs=make,
        call=call,
        eager=eager,
        factor=3.0 if backward else 2.0,
    )


def sites(batch: int = 256) -> list[Site]:
    """Every kernel at every DeiT shape, those that take most of DeiT-B's time first. batch: samples at 197 tokens."""
    found = []
    for model in reversed(MODELS):
        found += [_linear_site("gelu", model, 4, 1, batch), _linear_site("gelu_grad", model, 4, 1, batch)]
        found += [_attention_site(kernel, model, 197, batch) for kernel in ("fwd_short", "bwd_short")]
        found += [_linear_site("linear", model, 3, 1, batch), _linear_site("residual", model, 1, 4, batch)]
        found += [_linear_site("residual", model, 1, 1, batch)]
        found += [_layernorm_site("bwd", model, batch), _layernorm_site("fwd", model, batch), _sum_site(model, batch)]
    long = max(1, batch // 8)
    return found + [_attention_site(kernel, "B", 577, long) for kernel in ("fwd", "bwd_dq", "bwd_dkdv")]
