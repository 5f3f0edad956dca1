"""Broken programs show: correct PTX, without what makes it correct, is refused or gives wrong numbers."""

from __future__ import annotations

import re

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx import driver, small_kernels
from tests.ptx.kernels import needs_engine
from tests.ptx.mutate import (
    BARRIER,
    FENCE,
    WAIT_CP_ASYNC,
    WAIT_MBARRIER,
    WAIT_STORE,
    WAIT_WGMMA,
    Change,
    replaced,
    without,
)
from tests.ptx.parser import PtxError

pytestmark = needs_engine


class Case:
    """A launch whose result is known, and that can be repeated with changed PTX."""

    def __init__(self, arch, launch, out, exact):
        self.arch, self.launch, self.out, self.exact = arch, launch, out, exact
        self.ptx = ""
        assert self.wrong(self.remember, races=True) == 0

    def remember(self, ptx: str) -> str:
        self.ptx = ptx
        return ptx

    def wrong(self, change: Change, **options) -> int:
        """Number of wrong elements with `change` applied to the PTX."""
        self.out.fill_(float("nan"))
        with driver.emulated(self.arch, change, **options):
            self.launch()
        difference = (self.out.double() - self.exact).abs()
        return int((~(difference <= 0.02 * self.exact.abs().max())).sum())


@pytest.fixture
def pointers():
    """A pipelined product through cp.async and mma.sync on sm_80."""
    a, b = torch.randn(128, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    c = torch.empty(128, 64, dtype=torch.bfloat16)
    arguments = a, b, c, 128, 64, 256, 256, 64, 1
    launch = lambda: small_kernels.matmul_kernel[(2, 1)](*arguments, BM=64, BN=64, BK=32, num_warps=4)  # noqa: E731
    return Case(80, launch, c, a.double() @ b.double())


@pytest.fixture
def descriptors():
    """A pipelined product through TMA and wgmma on sm_90."""
    a, b = torch.randn(128, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    c = torch.empty(128, 64, dtype=torch.bfloat16)
    maps = [TensorDescriptor.from_tensor(x, [64, 64]) for x in (a, b, c)]
    blocks = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4}
    launch = lambda: small_kernels.tma_matmul_kernel[(2, 1)](*maps, 256, TRANSPOSED=True, **blocks)  # noqa: E731
    return Case(90, launch, c, a.double() @ b.double().T)


@pytest.fixture
def stores():
    """Tiles stored by descriptor, one after the other through the same shared memory."""
    a = torch.randn(320, 64).bfloat16()
    c = torch.empty_like(a)
    maps = [TensorDescriptor.from_tensor(x, [32, 64]) for x in (a, c)]
    return Case(90, lambda: small_kernels.double_kernel[(2,)](*maps, 10, ROWS=32), c, a.double() * 2)


@pytest.fixture
def softmax():
    x = torch.randn(3, 1000)
    out = torch.empty_like(x)
    return Case(80, lambda: small_kernels.softmax_kernel[(3,)](x, out, 1000, BLOCK=1024), out, x.double().softmax(-1))


@pytest.fixture
def add():
    x = torch.randn(250)
    out = torch.empty_like(x)
    return Case(80, lambda: small_kernels.add_kernel[(1,)](x, x, out, 250, BLOCK=256), out, x.double() * 2)


def test_missing_wait_for_cp_async(pointers):
    with pytest.raises(PtxError, match=r"cp\.async not waited for"):
        pointers.wrong(without(WAIT_CP_ASYNC))


def test_wait_for_cp_async_that_lets_too_many_groups_run(pointers):
    assert pointers.wrong(replaced(r"(cp\.async\.wait_group\s+)[1-9];", r"\g<1>7;")) > 0


def test_missing_barrier_of_a_pipelined_loop(pointers):
    """The two of the loop are needed; others that Triton emits are made superfluous by their neighbours."""
    caught = 0
    for i in range(len(re.findall(BARRIER, pointers.ptx))):
        try:
            caught += pointers.wrong(without(BARRIER, i), races=True) > 0
        except PtxError as error:
            caught += "data races" in str(error)
    assert caught >= 2


def test_missing_barrier_of_a_reduction(softmax):
    for i in range(len(re.findall(BARRIER, softmax.ptx))):
        with pytest.raises(PtxError, match="data races"):
            softmax.wrong(without(BARRIER, i), races=True)


def test_missing_wait_for_an_mbarrier(descriptors):
    with pytest.raises(PtxError, match=r"not waited for|in flight|more arrivals"):
        descriptors.wrong(without(WAIT_MBARRIER))


def test_missing_wait_for_wgmma(descriptors):
    with pytest.raises(PtxError, match=r"register of a wgmma that is still running|wgmma not waited for"):
        descriptors.wrong(without(WAIT_WGMMA))


def test_missing_proxy_fence(descriptors):
    with pytest.raises(PtxError, match=r"without a fence\.proxy\.async"):
        descriptors.wrong(without(FENCE), races=True)


def test_wrong_number_of_bytes_to_wait_for(descriptors):
    more = replaced(r"(expect_tx[^;]*), (\d+);", lambda m: f"{m[1]}, {int(m[2]) + 16};", count=1)
    with pytest.raises(PtxError, match="deadlock"):
        descriptors.wrong(more)


def test_source_of_a_store_overwritten_before_it_is_read(stores):
    with pytest.raises(PtxError, match="source was not waited for"):
        stores.wrong(without(WAIT_STORE))


def test_store_without_its_mask(add):
    with pytest.raises(PtxError, match=r"store of .* outside every tensor"):
        add.wrong(replaced(r"@%p\d+ (st\.global)", r"\1"))


def test_barrier_that_one_warp_misses(softmax):
    skip = replaced(BARRIER, "setp.lt.u32 %p0, %tid.x, 32; @%p0 bar.sync 0;", count=1)
    with pytest.raises(PtxError, match=r"deadlock|data races"):
        softmax.wrong(skip, races=True)


def test_instruction_that_is_not_modelled(add):
    with pytest.raises(PtxError, match=r"line \d+: add\.rz\.sat\.f32 .*not modelled"):
        add.wrong(replaced("add.f32", "add.rz.sat.f32", count=1))


def test_two_programs_write_the_same_element():
    x = torch.randn(300)
    out = torch.empty_like(x)
    with driver.emulated(80, races=True):
        small_kernels.add_kernel[(2,)](x, x, out, 300, BLOCK=256)
        with pytest.raises(PtxError, match="two CTAs write the same global byte"):
            small_kernels.overlapping_kernel[(2,)](x, out, 300, BLOCK=256)
