"""Small kernels whose results are known, as compiled code for both architectures and in every order of execution."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx import driver, small_kernels
from tests.ptx.kernels import needs_engine
from tests.ptx.parser import PtxError

pytestmark = needs_engine

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXECUTIONS = {
    "late": {},
    "at once": {"late": False},
    "reverse": {"schedule": "reverse", "reverse_ctas": True},
    "random": {"schedule": "random", "seed": 7, "quantum": 20},
    "races": {"races": True},
}
"""Ways to run a correct kernel that must all give the same bits."""


def every_execution(arch, launch, *outputs):
    """Run `launch` in each way; the outputs of the first, after all were found equal. Also what the last one ran."""
    first = None
    for options in EXECUTIONS.values():
        for tensor in outputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        with driver.emulated(arch, **options) as gpu:
            launch()
        first = first or [tensor.clone() for tensor in outputs]
        assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True)), options
    return gpu.launches[-1].operations


def close(actual, exact, dtype):
    """Within twice the dtype's rounding error, as 2-norms."""
    error = (actual.double() - exact).norm() / exact.norm()
    limit = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    assert error < limit, f"relative error {error:.2e}, limit {limit:.2e}"


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def arch(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_sums(arch, dtype):
    x, y = torch.randn(2, 1000).to(DTYPES[dtype])
    out = torch.empty_like(x)
    every_execution(arch, lambda: small_kernels.add_kernel[(4,)](x, y, out, 1000, BLOCK=256), out)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [17, 197, 1000])
def test_reductions_over_warps(arch, dtype, columns):
    x = torch.randn(5, columns).to(DTYPES[dtype])
    out = torch.empty_like(x)
    block = triton.next_power_of_2(columns)
    every_execution(arch, lambda: small_kernels.softmax_kernel[(5,)](x, out, columns, BLOCK=block), out)
    close(out, x.double().softmax(-1), DTYPES[dtype])


@pytest.mark.parametrize(
    ("dtype", "transposed", "blocks"),
    [
        ("bf16", False, (64, 64, 32, 4)),
        ("bf16", True, (128, 64, 64, 4)),
        ("fp16", True, (16, 32, 16, 1)),
        ("bf16", False, (128, 128, 64, 8)),
    ],
)
def test_pipelined_matmul_by_pointers(arch, dtype, transposed, blocks):
    """cp.async, ldmatrix and mma.sync, or wgmma where the tile has 64 rows, over edges on every side."""
    M, N, K = 130, 136, 200
    bm, bn, bk, warps = blocks
    a, b = torch.randn(M, K).to(DTYPES[dtype]), torch.randn(*((N, K) if transposed else (K, N))).to(DTYPES[dtype])
    c = torch.empty(M, N, dtype=a.dtype)
    strides = (1, b.stride(0)) if transposed else (b.stride(0), 1)
    grid = (triton.cdiv(M, bm), triton.cdiv(N, bn))
    ran = every_execution(
        arch,
        lambda: small_kernels.matmul_kernel[grid](
            a, b, c, M, N, K, a.stride(0), *strides, BM=bm, BN=bn, BK=bk, num_warps=warps
        ),
        c,
    )
    close(c, a.double() @ (b.double().T if transposed else b.double()), a.dtype)
    assert ("wgmma" if arch == 90 and bm >= 64 else "mma_sync") in ran


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [("bf16", (64, 64, 32, 4)), ("bf16", (128, 128, 64, 8)), ("fp16", (64, 256, 64, 4)), ("bf16", (64, 16, 16, 4))],
)
def test_pipelined_matmul_by_descriptors(dtype, transposed, blocks):
    """TMA in both directions with each swizzle, mbarriers and wgmma."""
    M, N, K = 130, 136, 200
    bm, bn, bk, warps = blocks
    a, b = torch.randn(M, K).to(DTYPES[dtype]), torch.randn(*((N, K) if transposed else (K, N))).to(DTYPES[dtype])
    c = torch.empty(M, N, dtype=a.dtype)
    shapes = [bm, bk], [bn, bk] if transposed else [bk, bn], [bm, bn]
    maps = [TensorDescriptor.from_tensor(x, shape) for x, shape in zip((a, b, c), shapes, strict=True)]
    grid = (triton.cdiv(M, bm), triton.cdiv(N, bn))
    ran = every_execution(
        90,
        lambda: small_kernels.tma_matmul_kernel[grid](
            *maps, K, TRANSPOSED=transposed, BM=bm, BN=bn, BK=bk, num_warps=warps
        ),
        c,
    )
    close(c, a.double() @ (b.double().T if transposed else b.double()), a.dtype)
    assert {"tma_load", "tma_store", "mbarrier", "wgmma"} <= ran.keys()


def test_persistent_matmul_with_a_flattened_loop():
    """One loop over tiles and K with four stages, whose loads run under the epilogue of the tile before."""
    a, b = torch.randn(300, 200).bfloat16(), torch.randn(136, 200).bfloat16()
    c = torch.empty(300, 136, dtype=torch.bfloat16)
    maps = [TensorDescriptor.from_tensor(x, [64, 64]) for x in (a, b)]
    ran = every_execution(
        90, lambda: small_kernels.persistent_matmul_kernel[(3,)](*maps, c, 300, 136, 200, BLOCK=64, num_stages=4), c
    )
    close(c, a.double() @ b.double().T, c.dtype)
    assert {"tma_load", "wgmma"} <= ran.keys()


def test_product_of_registers_with_shared_memory():
    """A softmax's result as wgmma's first operand, as attention has it."""
    q, k, v = torch.randn(3, 64, 64).bfloat16()
    out = torch.empty_like(q)
    maps = [TensorDescriptor.from_tensor(x, [64, 64]) for x in (q, k, v)]
    ran = every_execution(90, lambda: small_kernels.attend_kernel[(1,)](*maps, out, D=64), out)
    close(out, (q.double() @ k.double().T).mul(0.125).softmax(-1) @ v.double(), out.dtype)
    assert "wgmma" in ran


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_stores_by_descriptor_in_a_loop(columns):
    a = torch.randn(333, columns).bfloat16()
    c = torch.empty_like(a)
    maps = [TensorDescriptor.from_tensor(x, [32, columns]) for x in (a, c)]
    every_execution(90, lambda: small_kernels.double_kernel[(3,)](*maps, 11, ROWS=32), c)
    assert torch.equal(c, a * 2)


def test_atomics(arch):
    x = torch.randint(0, 9, (1000,)).float()
    out, largest = torch.zeros(7), torch.zeros((), dtype=torch.int32)
    with driver.emulated(arch, races=True):
        small_kernels.atomic_kernel[(8,)](x, out, largest, 1000, BLOCK=128)
    assert torch.equal(out, torch.stack([x[i::7].sum() for i in range(7)]))
    assert largest == 999


def test_scans_and_sorting(arch):
    x = torch.randint(-100, 100, (512,), dtype=torch.int32)
    total, order = torch.empty_like(x), torch.empty_like(x)
    every_execution(arch, lambda: small_kernels.scan_kernel[(1,)](x, total, order, BLOCK=512), total, order)
    assert torch.equal(total, x.cumsum(0).int())
    assert torch.equal(order, x.sort().values)


def test_branches(arch):
    x = torch.arange(1, 60, dtype=torch.int32)
    steps = torch.empty_like(x)
    every_execution(arch, lambda: small_kernels.collatz_kernel[(59,)](x, steps), steps)

    def collatz(n: int) -> int:
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert steps.tolist() == [collatz(n) for n in range(1, 60)]


def test_integer_arithmetic(arch):
    n = 256
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32)
    y = torch.randint(1, 2**20, (n,), dtype=torch.int32) * torch.tensor([1, -1]).repeat(n // 2).int()
    out = torch.empty(6, n, dtype=torch.int32)
    every_execution(arch, lambda: small_kernels.integer_kernel[(1,)](x, y, out, n, BLOCK=n), out)
    a, b = x.long(), y.long()
    assert torch.equal(out[0].long(), torch.div(a, b, rounding_mode="trunc"))
    assert torch.equal(out[1].long(), torch.fmod(a, b))
    high = [(i % 2**32 * (j % 2**32)) >> 32 for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    assert [value % 2**32 for value in out[2].tolist()] == high
    assert torch.equal(out[3], (x >> 3) ^ (y << 5))
    assert torch.equal(out[4].long() % 2**32, (torch.maximum(a, b) - torch.minimum(a, b)) % 2**32)
    assert torch.equal(out[5].long() % 2**32, (a * b >> 16) % 2**32)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounding_of_every_exponent(arch, dtype):
    """From subnormals past infinity, ties included: as torch rounds."""
    exponent = torch.arange(-45, 129, dtype=torch.float64)[:, None]
    fractions = torch.tensor([1.0, 1 + 2.0**-9, 1 + 2.0**-12, 1.5 + 2.0**-8, -(2 - 2.0**-13)])
    x = torch.cat([(2.0**exponent * fractions).float().flatten(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    out = torch.empty(len(x), dtype=DTYPES[dtype])
    back = torch.empty_like(x)
    with driver.emulated(arch):
        small_kernels.convert_kernel[(1,)](x, out, back, len(x), BLOCK=1024)
    assert torch.equal(out, x.to(out.dtype))
    assert torch.equal(back, out.float())


def test_an_access_outside_every_tensor_is_refused(arch):
    x, out = torch.zeros(100), torch.zeros(128)
    with (
        driver.emulated(arch),
        pytest.raises(PtxError, match=r"load of .* outside every tensor(.|\n)*small_kernels\.py"),
    ):
        small_kernels.unmasked_kernel[(1,)](x, out, 128, BLOCK=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "base 0x8 is no multiple of 16"),
        ({"strides": (100, 1)}, "strides of \\[200\\] bytes"),
        ({"block": (512, 64)}, "box \\[64, 512\\]"),
        ({"block": (64, 128)}, "rows of 256 bytes, swizzle 3"),
        ({"shape": (0, 64)}, "shape \\[64, 0\\]"),
    ],
)
def test_a_tensor_map_that_the_cuda_driver_would_refuse(change, message):
    right = {
        "address": 4096, "swizzle": 3, "element": 2, "kind": 9, "block": (64, 64), "shape": (100, 64),
        "strides": (64, 1), "nan_fill": False,
    }  # fmt: skip
    assert len(driver.tensor_map(**right)) == 128
    with pytest.raises(PtxError, match=message):
        driver.tensor_map(**right | change)
