"""Faults planted in kernels are found: a missing mask, a race, and each kind of missing wait in the project's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from deitfast.kernels.catalogue import OPS, Draw, Shape
from tests.planted_kernels import at_run_time
from tests.ptx import driver, mutate
from tests.ptx.kernels import compiled_kernels, needs_engine
from tests.ptx.mutate import in_kernel, replaced, without
from tests.ptx.parser import PtxError

pytestmark = needs_engine

SHAPE = Shape(width=192, heads=3, tokens=130, batch=1, classes=10)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def arch(request):
    return request.param


def test_missing_mask(arch):
    x, out = torch.randn(300), torch.empty(300)
    launch = partial(at_run_time.missing_mask_kernel[(2,)], x, out, len(x), BLOCK=256)
    with driver.emulated(arch):
        launch(WRONG=False)
        assert torch.equal(out, 2 * x)
        with pytest.raises(PtxError, match=r"store of \d+ bytes outside every tensor"):
            launch(WRONG=True)


def test_race_of_two_programs(arch):
    x, out = torch.randn(300), torch.zeros(2)
    launch = partial(at_run_time.racing_sums_kernel[(2,)], x, out, len(x), BLOCK=256)
    with driver.emulated(arch, races=True):
        launch(WRONG=False)
        torch.testing.assert_close(out, torch.stack([x[:256].sum(), x[256:].sum()]))
        with pytest.raises(PtxError, match=r"reads a global byte that another one writes|two CTAs write"):
            launch(WRONG=True)


def test_missing_wait(arch):
    """What is read before its copy is waited for is NaN."""
    x, out = torch.randn(1024), torch.empty(1024)
    launch = partial(at_run_time.missing_wait_kernel[(1,)], x, out, N=len(x), num_warps=4)
    with driver.emulated(arch):
        launch(WRONG=False)
        assert torch.equal(out, x)
        launch(WRONG=True)
        assert out.isnan().all()


REAL = [
    (80, "linear_residual", "linear_kernel", without(mutate.WAIT_CP_ASYNC), r"cp\.async not waited for"),
    (80, "linear_residual", "linear_kernel", without(mutate.BARRIER), "data races"),
    (80, "layernorm_qkv", "layernorm_bwd_kernel", without(mutate.BARRIER), "data races"),
    (80, "layernorm_qkv", "layernorm_fwd_kernel", replaced(r"@%p\d+ (st\.global)", r"\1"), "store of .* outside"),
    (80, "attention", "attention_bwd_dq_kernel", without(mutate.WAIT_CP_ASYNC), r"cp\.async not waited for"),
    (90, "linear_residual", "linear_kernel", without(mutate.WAIT_MBARRIER), "not waited for|in flight|more arrivals"),
    (90, "linear_residual", "linear_kernel", without(mutate.WAIT_WGMMA), "wgmma that is still running|not waited for"),
    (90, "attention", "attention_fwd_short_kernel", without(mutate.WAIT_MBARRIER), "not waited for|in flight|races"),
    (90, "attention", "attention_bwd_short_kernel", without(mutate.WAIT_STORE), "source was not waited for"),
    (90, "attention", "attention_bwd_short_kernel", without(mutate.FENCE), r"without a fence\.proxy\.async"),
]


@pytest.mark.parametrize(
    ("arch", "op", "kernel", "change", "found"), REAL, ids=[f"sm_{a}-{k}-{i}" for i, (a, _, k, _, _) in enumerate(REAL)]
)
def test_missing_wait_or_barrier_in_a_kernel_of_ours(arch, op, kernel, change, found):
    op = OPS[op]
    tensors = op.inputs(Draw(0, torch.bfloat16), SHAPE)
    leaves = {k: t.requires_grad_(k not in op.constants) for k, t in tensors.items()}
    with (
        compiled_kernels(arch, races=True, change=in_kernel(kernel, change)),
        pytest.raises(PtxError, match=found) as error,
    ):
        op.function(**leaves, **op.options(SHAPE)).sum().backward()
    assert kernel in str(error.value)
