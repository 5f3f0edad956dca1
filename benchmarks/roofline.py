"""The roofline on paper: FLOPs, bytes and the least time of every op of a training step. Needs no GPU.

    python -m benchmarks.roofline --model deit_base --gpu h100 [--batch 512] [--tflops X --gbps Y]

What is counted, and how: deitfast/model/work.py. Rates are the datasheet's unless given.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from deitfast.errors import DeitfastError
from deitfast.model.work import (
    CLASSES,
    GPUS,
    IMAGENET_EPOCHS,
    Gpu,
    forward_macs,
    full_name,
    hours_for_imagenet,
    model_flops,
    part_floors,
    step_ops,
)
from deitfast.model.zoo import find_variant


@dataclass(frozen=True)
class Budget:
    """One line of the plan for DeiT-B at 224 px on one H100, in microseconds an image. A plan, not a measurement."""

    part: str
    floor: float
    budget: float
    how: str


BUDGET_MODEL = "deit_base_patch16_224"
BUDGET = (
    Budget("GEMM forward", 42, 55, "epilogues fused, no separate GELU, bias or residual pass"),
    Budget("GEMM dgrad", 42, 55, "gelu' multiply and bias column sums in the epilogue"),
    Budget("GEMM wgrad", 42, 54, ""),
    Budget("attention", 16, 22, "whole sequence on chip, straight from packed qkv"),
    Budget("norm", 6, 14, "LayerNorm, residual, statistics: in GEMM epilogues both ways, or one pass each"),
    Budget("optimiser", 2.5, 4, "AdamW, EMA and casts in one kernel over flat buffers, batch 512"),
    Budget("input", 1, 4, "uint8 in, patches out; patch product, heads, loss"),
    Budget("gaps", 0, 0, "the whole step in a CUDA graph"),
)

# torch.utils.flop_counter --------------------------------------------------------------------------------------------


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
    import torch

    import deitfast.model.fused  # noqa: F401 (defines the ops)

    ours, aten = torch.ops.deitfast, torch.ops.aten

    def sdpa(factor: int, q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
        batch, heads, rows, width = q
        return factor * batch * heads * rows * k[2] * width

    # The halves of a block. Output 1 of the forward and argument 9 of the backward are the normalised rows, of those
    # samples alone that run through the branch; output 4 and argument 12 are qkv.
    def half(*shapes: Any, out_shape: Any, **_: Any) -> int:
        return _counted_products(out_shape[1], shapes[3], shapes[5])

    def half_bwd(*shapes: Any, **_: Any) -> int:
        return _counted_products(shapes[9], *shapes[3:5], factor=4)

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
        ours.layernorm_attention_bwd: lambda *x, **_: half_bwd(*x) + _attention(10, x[12]),
        ours.layernorm_mlp: half,
        ours.layernorm_mlp_bwd: half_bwd,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa(4, q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *_, **__: sdpa(10, q, k, v),
    }


class _Unhooked(contextlib.nullcontext[None]):
    """In place of `ModuleTracker`: everything belongs to the whole."""

    parents = frozenset({"Global"})


def counted_flops(model: str, *, fused: bool, backward: bool = False) -> int:
    """FLOPs of one image as torch.utils.flop_counter sees them in `deitfast.create_model(model, fused=fused)`.

    Runs on the meta device: nothing is computed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from deitfast.model.deit import DeiT
    from deitfast.model.factory import create_model

    # The truncated normal looks at its draws, which the meta device has none of.
    with torch.device("meta"), mock.patch.object(DeiT, "init_weights"):
        net = create_model(full_name(model), fused=fused)
    images = torch.empty(1, 3, net.image_size, net.image_size, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    # It follows the modules by hooks on all of them, and a block that is hooked computes what a hook may ask for.
    counter.mod_tracker = _Unhooked()  # type: ignore[assignment]
    with counter:
        out = net(images)
        if backward:
            (torch.stack(out) if isinstance(out, tuple) else out).sum().backward()
    return counter.get_total_flops()


# The command ---------------------------------------------------------------------------------------------------------


def report(model: str, batch: int, gpu: Gpu) -> str:
    """The table of every op, the sums by part and, for DeiT-B at 224, the budget beside them."""
    name = full_name(model)
    variant = find_variant(name)
    ops = step_ops(variant, batch)
    lines = [
        f"{name}, batch {batch}, {gpu.name} ({gpu.tflops:g} TFLOP/s, {gpu.gbps:g} GB/s); an image at a time",
        f"{'op':26}{'part':14}{'count':>6}{'GFLOP':>10}{'MB':>10}{'bound':>9}{'floor us':>10}",
    ]
    for op in ops:
        gflop, megabytes = op.count * op.flops / 1e9, op.count * op.nbytes / 1e6
        bound, floor = op.bound(gpu.tflops, gpu.gbps), op.floor_us(gpu.tflops, gpu.gbps)
        lines.append(f"{op.name:26}{op.part:14}{op.count:6}{gflop:10.3f}{megabytes:10.3f}{bound:>9}{floor:10.3f}")
    planned = {line.part: line for line in BUDGET} if name == BUDGET_MODEL else {}
    lines += ["", f"{'part':22}{'floor us':>10}" + (f"{'plan: floor':>14}{'budget':>8}  how" if planned else "")]
    floors = part_floors(name, batch, gpu.tflops, gpu.gbps)
    for part, floor in floors.items():
        plan = planned.get(part)
        tail = f"{plan.floor:14g}{plan.budget:8g}  {plan.how}" if plan else ""
        lines.append(f"{part:22}{floor:10.2f}{tail}".rstrip())
    total = sum(floors.values())
    tail = f"{sum(x.floor for x in BUDGET):14g}{sum(x.budget for x in BUDGET):8g}" if planned else ""
    lines.append(f"{'sum':22}{total:10.2f}{tail}")
    lines += [
        "",
        f"forward {forward_macs(name) / 1e9:.2f} G multiply-adds, training {model_flops(name) / 1e9:.1f} GFLOP an "
        f"image (3 x forward), {variant.parameters(CLASSES) / 1e6:.2f} M parameters",
        f"no step is faster than {1e6 / total:,.0f} images/s, {hours_for_imagenet(1e6 / total):.1f} hours for "
        f"{IMAGENET_EPOCHS} epochs of ImageNet-1k: a bound, not a measurement",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_base", help="deit_tiny, deit_base_384, ... or a whole name")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="whose datasheet (default h100)")
    parser.add_argument("--batch", type=int, default=512, help="images that share weights and optimiser (default 512)")
    parser.add_argument("--tflops", type=float, help="matmul rate to use instead, such as a measured roof")
    parser.add_argument("--gbps", type=float, help="bandwidth to use instead")
    options = parser.parse_args(argv)
    sheet = GPUS[options.gpu]
    try:
        if min(options.batch, options.tflops or 1, options.gbps or 1) <= 0:
            raise DeitfastError("--batch, --tflops and --gbps must be positive")
        gpu = Gpu(sheet.name, options.tflops or sheet.tflops, options.gbps or sheet.gbps)
        print(report(options.model, options.batch, gpu))
    except DeitfastError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
