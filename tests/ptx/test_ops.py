"""Every op of the catalogue as compiled code: right in bf16, by the chip's own instructions, and free of races."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from deitfast.kernels.attention_op import attention_launch
from deitfast.kernels.catalogue import OPS, Draw, Shape
from deitfast.kernels.tunable import picked, selection
from tests.kernels.tolerance import assert_close_to_float64
from tests.ptx.kernels import compiled_kernels, needs_engine

pytestmark = needs_engine

SHAPE = Shape.of("Ti", tokens=197, batch=2)
PRODUCTS = {80: {"mma_sync", "ldmatrix", "cp_async"}, 90: {"wgmma", "tma_load", "mbarrier"}}
"""How each chip multiplies matrices."""
WITHOUT_PRODUCTS = {"input_patches", "mixed_cross_entropy", "mixed_bce"}


def outputs_and_gradients(op, function, dtype=torch.bfloat16):
    """Output and gradients by name, computed in `dtype`, for the same bf16 inputs and incoming gradient."""
    drawn = op.inputs(Draw(0, torch.bfloat16), SHAPE)
    tensors = {k: t.to(dtype) if t.dtype == torch.bfloat16 else t for k, t in drawn.items()}
    leaves = {k: t.clone().requires_grad_(k not in op.constants) for k, t in tensors.items()}
    out = function(**leaves, **op.options(SHAPE))
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}
    if not wanted:
        return {"out": out}
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(out.dtype)
    gradients = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach()} | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}


@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_is_right_in_any_order_of_execution_and_without_a_race(name, arch):
    op = OPS[name]
    with compiled_kernels(arch, races=True) as gpu:
        actual = outputs_and_gradients(op, op.function)
    with compiled_kernels(arch, schedule="reverse", reverse_ctas=True, late=False):
        again = outputs_and_gradients(op, op.function)
    exact, eager = outputs_and_gradients(op, op.reference, torch.float64), outputs_and_gradients(op, op.reference)
    for tensor, result in actual.items():
        assert torch.equal(result, again[tensor]), tensor
        assert_close_to_float64(
            tensor, result, exact[tensor].double(), eager[tensor].to(result.dtype), 2 if tensor == "out" else 3
        )
    ran = Counter()
    for launch in gpu.launches:
        ran.update(launch.operations)
    assert ran, "no kernel ran"
    assert PRODUCTS[arch] <= ran.keys() or name in WITHOUT_PRODUCTS


def test_attentions_backward_with_transposed_scores():
    """The entry that sm_90 has beside its own; with drop-path's factor and the sums that qkv's bias takes."""
    offered = selection(attention_launch, 90, "bwd_short", 2, 64)
    (entry,) = (x for x in offered.others if x is not None and "LAST" in x.tiles)
    with picked({offered.name: entry}):
        test_an_op_is_right_in_any_order_of_execution_and_without_a_race("layernorm_attention", 90)
