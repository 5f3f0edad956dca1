"""FLOPs and kernels of a model as they are counted on it, by torch and by what the launchers record. Needs no GPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deitfast.kernels.catalogue import OPS, Draw, Shape
from deitfast.kernels.common import record
from deitfast.model.deit import DeiT
from deitfast.model.factory import create_model


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _attention(factor: int, qkv: Sequence[int]) -> int:
    """factor B N^2 D for packed qkv (B, N, 3D)."""
    batch, tokens, packed = qkv
    return factor * batch * tokens * tokens * packed // 3


def _counted_products(x: Sequence[int], *weights: Sequence[int], factor: int = 2) -> int:
    """factor x rows of x x the weights' sizes: 2 for a forward, 4 for a backward."""
    return factor * _numel(x[:-1]) * sum(map(_numel, weights))


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for `FlopCounterMode(custom_mapping=...)`: the ops of `deitfast.kernels`, which would count zero, and
    the CPU's own attention. Arguments are the op's, tensors as shapes."""
    ours, aten = torch.ops.deitfast, torch.ops.aten

    def sdpa(factor: int, q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
        batch, heads, rows, width = q
        return factor * batch * heads * rows * k[2] * width

    # The halves of a block. Output 1 of the forward is the normalised rows, of those samples alone that run through the
    # branch; so is argument 9 of the attention's backward, and the first tensor of argument 11 of the MLP's, which are
    # none where the hidden layer is computed again. Output 4 and argument 12 are qkv.
    def half(*shapes: Any, out_shape: Any, **_: Any) -> int:
        return _counted_products(out_shape[1], shapes[3], shapes[5])

    def mlp_bwd(*shapes: Any, **_: Any) -> int:
        x, fc1, fc2, kept = shapes[1], shapes[4], shapes[6], shapes[11]
        again = 0 if kept else _counted_products(x, fc1)
        return again + _counted_products(kept[0] if kept else x, fc1, fc2, factor=4)

    return {
        ours.attention_fwd: lambda qkv, *_, **__: _attention(4, qkv),
        ours.attention_bwd: lambda dout, qkv, *_, **__: _attention(10, qkv),
        ours.layernorm_qkv: lambda x, lw, lb, w, *_, **__: _counted_products(x, w),
        ours.layernorm_qkv_bwd: lambda dout, x, lw, w, *_, **__: _counted_products(x, w, factor=4),
        ours.linear_residual: lambda x, w, *_, **__: _counted_products(x, w),
        ours.linear_residual_bwd: lambda dout, x, w, *_, **__: _counted_products(x, w, factor=4),
        ours.mlp_gelu: lambda x, w1, b1, w2, *_, **__: _counted_products(x, w1, w2),
        ours.mlp_gelu_bwd: lambda dout, x, w1, w2, *_, **__: _counted_products(x, w1, w2, factor=4),
        ours.patch_embed: lambda patches, w, *_, **__: _counted_products(patches, w),
        ours.patch_embed_bwd: lambda dout, patches, *_, **__: _counted_products(patches, [dout[-1], patches[-1]]),
        ours.layernorm_attention: lambda *x, out_shape: half(*x, out_shape=out_shape) + _attention(4, out_shape[4]),
        ours.layernorm_attention_bwd: lambda *x, **_: (
            _counted_products(x[9], x[3], x[4], factor=4) + _attention(10, x[12])
        ),
        ours.layernorm_mlp: half,
        ours.layernorm_mlp_bwd: mlp_bwd,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa(4, q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *_, **__: sdpa(10, q, k, v),
    }


class _Unhooked(contextlib.nullcontext[None]):
    """In place of `ModuleTracker`: everything belongs to the whole."""

    parents = frozenset({"Global"})


def counted_flops(model: str, *, fused: bool, backward: bool = False, recompute: bool = False) -> int:
    """FLOPs of one image as torch.utils.flop_counter sees them in `deitfast.create_model(model, fused=fused)`.

    Runs on the meta device, in bf16 as on a GPU: nothing is computed.
    """
    # The truncated normal looks at its draws, which the meta device has none of.
    with torch.device("meta"), mock.patch.object(DeiT, "init_weights"):
        net = create_model(model, fused=fused).bfloat16()
    block: Any
    for block in net.blocks:
        block.recompute = recompute
    images = torch.empty(1, 3, net.image_size, net.image_size, device="meta", dtype=torch.bfloat16)
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    # It follows the modules by hooks on all of them, and a block that is hooked computes what a hook may ask for.
    counter.mod_tracker = _Unhooked()  # type: ignore[assignment]
    with counter:
        out = net(images)
        if backward:
            (torch.stack(out) if isinstance(out, tuple) else out).sum().backward()
    return counter.get_total_flops()


def counted_launches(shape: Shape, arch: int = 90) -> Counter[str]:
    """Kernel -> how often one whole block launches it, forward and backward, in bf16 with drop-path's factors."""
    with FakeTensorMode(), record(arch) as launches:
        for half in (OPS["layernorm_attention"], OPS["layernorm_mlp"]):
            tensors = half.inputs(Draw(0, torch.bfloat16), shape)
            del tensors["gamma"]
            for name, tensor in tensors.items():
                tensor.requires_grad_(name not in half.constants)
            out = half.function(**tensors, **half.options(shape))
            out.backward(torch.empty_like(out))
    return Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in launches)
