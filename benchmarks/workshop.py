"""The kernels as compile_report and tune meet them: uses that launch every one, and sites where entries are tried.

Uses of the public ops launch every kernel at every launch-table entry between them, forward and backward, at sizes
that DeiTs have; the tensors are made where tensors have no data, and never filled. A batch of 16 makes every size a
multiple of 16, as in training; one of 3 does not, as at the end of an evaluation; one of 512 has rows enough for
LayerNorm and a linear layer in one kernel.

A site is a kernel at a DeiT shape; the entries to try are what the package offers. It compares with eager PyTorch in
the same dtype and in float64; its `call` runs one kernel (two for the looping attention backward) through the
package's own launcher, so that what is tuned is what will run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.compile_report import Case, cases_of
from deitfast.kernels import attention_op, gemm, layernorm, layernorm_linear
from deitfast.kernels.catalogue import MODELS, OPS, Draw, Shape, Tensors
from deitfast.kernels.common import architecture, record
from deitfast.kernels.flat_buffers import BLOCK, FlatBuffers, Optimizer, Segments
from deitfast.kernels.image_ops import image_ops
from deitfast.kernels.optimizer import update
from deitfast.kernels.tunable import Pick, Selection, picked, selection

BF16, FP32 = torch.bfloat16, torch.float32
HALVES = ("layernorm_attention", "layernorm_mlp")
"""Of a block."""
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
            # A multiple of 16 as is the measurement's number, and enough for the kernels that want many samples.
            inputs = self.inputs(Draw(0, torch.bfloat16, "cpu"), replace(self.shape, batch=512))
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


def _gelu_with_derivative(h: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        return F.gelu(h), torch.autograd.grad(F.gelu(leaf).sum(), leaf)[0]


def _linear_site(stage: str, model: str, outputs: int, inputs: int, batch: int) -> Site:
    """stage: linear, residual, gelu or gelu_grad; outputs, inputs: in widths of the model."""
    shape = Shape.of(model, 197, batch)
    N, K = outputs * shape.width, inputs * shape.width
    epilogue = {"residual": "linear", "linear": "bias"}.get(stage, stage)

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
            return _gelu_with_derivative(h)
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


def _layernorm_linear_site(epilogue: str, model: str, outputs: int, batch: int) -> Site:
    """LayerNorm and the layer after it, in one kernel or two. outputs: in widths of the model."""
    shape = Shape.of(model, 197, batch)
    N = outputs * shape.width

    def call(t: Tensors) -> tuple[Tensor, ...]:
        arguments = t["x"], t["ln_weight"], t["ln_bias"], EPS, t["weight"], t["bias"]
        if epilogue == "gelu":
            return layernorm_linear.layernorm_gelu_fwd(*arguments, save=True)[:2]
        return (layernorm_linear.layernorm_linear_fwd(*arguments)[0],)

    def eager(t: Tensors) -> tuple[Tensor, ...]:
        normed = F.layer_norm(t["x"], t["x"].shape[-1:], t["ln_weight"], t["ln_bias"], EPS)
        h = F.linear(normed, t["weight"], t["bias"])
        return _gelu_with_derivative(h) if epilogue == "gelu" else (h,)

    return Site(
        name=f"layernorm_{epilogue} {shape} N={N}",
        op="layernorm_qkv" if epilogue == "linear" else "layernorm_mlp",
        shape=shape,
        selection=lambda arch: selection(
            layernorm_linear.layernorm_linear_launch, arch, 2, N, shape.width, epilogue, True
        ),
        inputs=lambda draw, s: {
            "x": draw.activations(s.rows, s.width),
            **draw.norm("ln", s.width),
            **draw.linear("", N, s.width),
        },
        call=call,
        eager=eager,
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
        selection=lambda arch: selection(layernorm.layernorm_launch, stage, shape.width, 2),
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
        found += [_layernorm_linear_site("linear", model, 3, batch), _layernorm_linear_site("gelu", model, 4, batch)]
        found += [_linear_site("linear", model, 3, 1, batch), _linear_site("residual", model, 1, 4, batch)]
        found += [_linear_site("residual", model, 1, 1, batch)]
        found += [_layernorm_site("bwd", model, batch), _layernorm_site("fwd", model, batch), _sum_site(model, batch)]
    long = max(1, batch // 8)
    return found + [_attention_site(kernel, "B", 577, long) for kernel in ("fwd", "bwd_dq", "bwd_dkdv")]


# Uses ----------------------------------------------------------------------------------------------------------------

STREAM = ("x", "ln_weight", "ln_bias", "gamma", "prefix_tokens", "pos_embed")
"""What has the residual stream's dtype; all else that is learnt has that of the products."""


def _use(
    op: str,
    shape: Shape,
    dtype: torch.dtype = BF16,
    stream: torch.dtype = BF16,
    without: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """An op of the catalogue on its inputs but those `without`, forward and, where gradients are on, backward."""
    chosen = OPS[op]
    tensors = chosen.inputs(Draw(0, dtype), shape)
    given = {name: x.to(stream) if name in STREAM else x for name, x in tensors.items() if name not in without}
    for name, tensor in given.items():
        tensor.requires_grad_(name not in chosen.constants)
    out = chosen.function(**given, **{**chosen.options(shape), **options})
    if out.requires_grad:
        out.backward(torch.empty_like(out))


def _block(shape: Shape, form: str, gamma: bool, halves: tuple[str, ...] = HALVES, **dtypes: torch.dtype) -> None:
    """form: drop-path as "whole" (none), "scaled" (a factor a sample) or "subset" (some samples run)."""
    without = ("gamma",) * (not gamma) + ("path_scale",) * (form != "scaled")
    options: dict[str, Any] = {}
    if form == "subset":
        options = {"subset": torch.empty(shape.batch - 1, dtype=torch.int64), "subset_scale": 1.25}
    for half in halves:
        _use(half, shape, without=without, **dtypes, **options)


def _attention(head_dim: int, tokens: int, dtype: torch.dtype) -> None:
    """By itself, with two heads; and with drop-path's factor, before a projection whose bias wants the sums of dq."""
    shape = Shape(2 * head_dim, 2, tokens, 16)
    _use("attention", shape, dtype)
    _block(shape, "scaled", gamma=False, halves=("layernorm_attention",), dtype=dtype, stream=dtype)


def _attention_transposed(tokens: int) -> None:
    """By the backward kernel that sm_90 has beside its own, where it is offered."""
    offered = selection(attention_op.attention_launch, architecture(torch.empty(0)), "bwd_short", 2, 64)
    for entry in offered.others:
        if entry is not None and "LAST" in entry.tiles:
            with picked({offered.name: entry}):
                _attention(64, tokens, BF16)


def _input(patch_size: int, mixes: bool, dtype: torch.dtype) -> None:
    _use("input_patches", Shape(0, 0, 1 + (224 // patch_size) ** 2, 16, patch_size=patch_size), dtype, mixes=mixes)


def _image_ops() -> None:
    plan = torch.empty(2, 16, 8, dtype=torch.float64)
    image_ops(torch.empty(16, 224, 224, 3, dtype=torch.uint8), plan, (124, 116, 104), blurs=True)


def _update(optimizer: Optimizer, copies: bool) -> None:
    """copies: a bf16 compute copy with bf16 gradients, and an average."""
    blocks, flat = 8449, 8449 * BLOCK
    segments = Segments(
        padded=(flat,), decays=(0.05,), block_decay=torch.empty(blocks),
        block_segment=torch.empty(blocks, dtype=torch.int32), blocks=blocks,
        first_block=torch.empty(2, dtype=torch.int32), segment_decay=torch.empty(1),
    )  # fmt: skip
    buffers = FlatBuffers(
        segments,
        grad=torch.empty(flat, dtype=BF16 if copies else FP32),
        master=torch.empty(flat),
        exp_avg=torch.empty(flat),
        exp_avg_sq=None if optimizer == "sgd" else torch.empty(flat),
        ema=torch.empty(flat) if copies else None,
        compute=torch.empty(flat, dtype=BF16) if copies else None,
        norm=torch.empty(()),
        skipped=torch.empty((), dtype=torch.int64),
        steps=torch.empty(()),
    )
    update(optimizer, buffers, torch.empty(12))


def _linear_ops() -> None:
    mlp = ("layernorm_mlp",)
    for width in (192, 384, 768):
        shape, odd = (Shape(width, width // 64, 197, batch) for batch in (16, 3))
        for form, gamma in itertools.product(("scaled", "subset"), (False, True)):
            _block(shape, form, gamma)
        for form in ("scaled", "subset"):
            _block(shape, form, gamma=True, stream=FP32)
            _block(shape, form, gamma=True, halves=mlp, dtype=FP32, stream=FP32)
        _block(shape, "whole", gamma=False)
        _block(odd, "scaled", gamma=True)
        with torch.no_grad():
            _block(odd, "whole", gamma=False)
        _use("layernorm_qkv", shape)
        _block(replace(shape, batch=512), "scaled", gamma=False)
    for stream in (BF16, FP32):
        _block(Shape(768, 12, 197, 512), "subset", gamma=True, stream=stream)
    _block(Shape(1280, 16, 257, 16), "subset", gamma=True)  # DeiT III's largest
    for form in ("whole", "scaled", "subset"):
        _block(Shape(197, 1, 197, 16), form, gamma=form != "whole", halves=mlp)  # rows that are not aligned


def uses() -> None:
    """All of them."""
    _linear_ops()
    for head_dim, tokens in ((64, 192), (64, 256), (64, 577), (32, 197), (32, 577), (96, 257), (128, 257)):
        _attention(head_dim, tokens, BF16)
    _attention_transposed(197)
    for head_dim, tokens in ((32, 197), (64, 197), (80, 257)):  # tokens choose no kernel in fp32
        _attention(head_dim, tokens, FP32)
    for width, prefix, stream in ((192, 1, BF16), (192, 2, BF16), (768, 1, BF16), (768, 2, FP32)):
        _use("patch_embed", Shape(width, 0, prefix + 196, 16, prefix), stream=stream)
    _use("patch_embed", Shape(1280, 0, 197, 16, patch_size=14))  # rows that are not aligned
    _use("patch_embed", Shape(384, 0, 198, 16, prefix=2), FP32, FP32)
    for patch_size, mixes, dtype in ((16, True, BF16), (16, False, BF16), (4, True, BF16), (16, True, FP32)):
        _input(patch_size, mixes, dtype)
    _image_ops()
    for classes, dtype in ((1000, BF16), (21841, BF16), (1000, FP32)):
        for loss in ("mixed_cross_entropy", "mixed_bce"):
            _use(loss, Shape(0, 0, 0, 16, classes=classes), dtype)
    for optimizer in get_args(Optimizer):
        _update(optimizer, copies=True)
    _update("adamw", copies=False)
