"""The launch tables of the linear ops and the parts of their kernels that the ops' own tests cannot reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from deitfast.kernels import gemm, layernorm, layernorm_linear, row_sums
from deitfast.kernels.catalogue import Draw
from deitfast.kernels.common import INTERPRETED, Launch, record
from deitfast.kernels.gemm_kernels import gelu_with_derivative
from deitfast.kernels.tunable import picked, selection
from tests.kernels.linear_ops import OPS, check
from tests.ptx.kernels import compiled_kernels, needs_engine

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@interpreter_only
@pytest.mark.parametrize("name", ["layernorm_mlp", "linear_residual"])
@pytest.mark.parametrize(
    ("arch", "tile"), [(arch, tile) for arch in (0, 90) for tile in gemm.LAUNCHES[arch] if arch == 0 or tile[1] > 64]
)
def test_every_launch_table(monkeypatch, name, arch, tile):
    """The tiles that other chips use, through tensor descriptors where they do, over more than one tile a side.

    Between them the two ops have every epilogue.
    """
    itemsize, columns = tile
    monkeypatch.setattr(gemm, "INTERPRETED", False)
    monkeypatch.setattr(gemm, "architecture", lambda x: arch)
    for module in (layernorm, layernorm_linear):  # which on a chip that it does not know takes two kernels
        monkeypatch.setattr(module, "INTERPRETED", False)
    used: list[Launch] = []
    choose = gemm.linear_launch
    monkeypatch.setattr(gemm, "linear_launch", lambda *arguments: (used.append(choose(*arguments)), used[-1])[1])
    draw = Draw(0, torch.float32 if itemsize == 4 else torch.float16)
    width, second = {0: (67, 129), 64: (192, 320), 128: (128, 384), 256: (256, 128)}[columns]
    check(OPS[name], OPS[name].inputs(draw, (1, 140), width, second))
    assert gemm.LAUNCHES[arch][tile] in used


def test_tables_fit_the_chips():
    """Operands of all stages within a block's shared memory: 99 KB where the chip is unknown, 163 KB, 227 KB."""
    for arch, limit in ((0, 99), (80, 163), (90, 227), (100, 227)):
        for (itemsize, _), launch in gemm.LAUNCHES[arch].items():
            m, n, k = (launch.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
            assert launch.num_stages * (m + n) * k * itemsize <= limit * 1024
            assert n % launch.tiles["EPILOGUE_PARTS"] == 0


@pytest.mark.parametrize(
    ("arguments", "tile"),
    [
        ((90, 2, 2304, 768, "linear", True), (2, 256)),
        ((90, 2, 3072, 768, "gelu", True), (2, 256)),
        ((100, 2, 3072, 768, "gelu", True), (2, 128)),
        ((90, 2, 192, 192, "linear", True), (2, 64)),
        ((90, 2, 200, 192, "linear", True), (2, 128)),
        ((90, 2, 201, 192, "linear", False), (2, 0)),
        ((80, 2, 768, 768, "linear", True), (2, 128)),
        ((0, 4, 768, 768, "gelu_grad", True), (4, 64)),
    ],
)
def test_launch_choice(arguments, tile):
    assert gemm.linear_launch(*arguments) == gemm.LAUNCHES[arguments[0]][tile]


@needs_engine
def test_programs_that_take_tiles_in_turns(monkeypatch):
    """Every epilogue as compiled code for sm_90, by two programs for four tiles or more, without a race."""
    tile = replace(gemm.LAUNCHES[90][2, 64], programs=2)
    monkeypatch.setattr(gemm, "linear_launch", lambda *arguments: tile)
    with compiled_kernels(90, races=True) as gpu:
        check(OPS["layernorm_mlp"], OPS["layernorm_mlp"].inputs(Draw(0, torch.bfloat16), (2, 66), 96, 192))
    assert {launch.grid[0] for launch in gpu.launches if launch.kernel == "linear_kernel"} == {2}


def test_cublas_is_offered_where_a_bias_is_all():
    """And taken where it is picked; it launches none of our kernels."""
    found = selection(gemm.linear_launch, 90, 2, 2304, 768, "bias", True)
    assert None in found.others
    assert None not in selection(gemm.linear_launch, 90, 2, 2304, 768, "linear", True).others

    def launches() -> list[Any]:
        a, weight, bias = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((64, 768), (2304, 768), (2304,)))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, record(90) as recorded:
            gemm.linear_fwd(*(mode.from_tensor(x) for x in (a, weight, bias)))
        return recorded

    if not INTERPRETED:
        assert len(launches()) == 1
        with picked({found.name: None}):
            assert not launches()


@triton.jit
def _gelu_kernel(h, value, slope, N, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, s = gelu_with_derivative(tl.load(h + offset, mask=offset < N, other=0.0), EXACT)
    tl.store(value + offset, v, mask=offset < N)
    tl.store(slope + offset, s, mask=offset < N)


@pytest.mark.parametrize("exact", [True, False])
def test_gelu_and_its_derivative(device, exact):
    """Against float64, from the far tails to the middle; the polynomial adds a fraction of fp16's own rounding."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the kernels need CUDA or TRITON_INTERPRET=1")
    h = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e30, -1e4, -0.0, 1e-30, 1e4, 1e30])]).to(device)
    value, slope = torch.empty_like(h), torch.empty_like(h)
    _gelu_kernel[(triton.cdiv(len(h), 4096),)](h, value, slope, len(h), EXACT=exact, BLOCK=4096)
    h64 = h.double()
    Phi, phi = torch.special.ndtr(h64), torch.exp(-h64 * h64 / 2) / (2 * torch.pi) ** 0.5
    for name, actual, expected in (("gelu", value, h64 * Phi), ("derivative", slope, Phi + h64 * phi)):
        error = (actual - expected).abs()
        if exact:  # 1 + erf cancels in the tail: an absolute error of an ulp of 1, times |h|
            allowed = 2e-7 * h64.abs().clamp(min=1)
        else:
            ulp = torch.finfo(torch.float16).eps * 2.0 ** expected.abs().clamp(min=2.0**-14).log2().floor()
            allowed = 0.1 * ulp if name == "gelu" else torch.maximum(0.1 * ulp, torch.full_like(ulp, 1.5e-5))
        assert (error <= allowed).all(), f"{name}: {float((error / allowed).max()):.2f} of the allowed error"


@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("with_path_scale", [False, True])
def test_scale_and_sum(device, monkeypatch, with_gamma, with_path_scale):
    """The tile of the GPUs, over several tiles a side and several rounds of a program."""
    monkeypatch.setattr(gemm, "INTERPRETER_SUM_LAUNCH", replace(gemm.SUM_LAUNCH, programs=4))
    draw = Draw(0, torch.float16, device)
    dout = draw.normal(5 * 23, 130)
    gamma = draw.normal(130) if with_gamma else None
    path_scale = draw.path_scale(5) if with_path_scale else None
    branch, scaled, sums = gemm.scale_and_sum(dout, torch.float16, gamma, path_scale)
    expected = (
        dout.double() if path_scale is None else dout.double() * path_scale.double().repeat_interleave(23)[:, None]
    )
    torch.testing.assert_close(sums.double(), expected.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(branch.double(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled.double(), expected if gamma is None else expected * gamma, rtol=2e-3, atol=1e-5)
    assert (branch is dout) == (path_scale is None), "a copy of what is unchanged"
    assert (scaled is branch) == (gamma is None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 33), (300, 64), (129, 1)])
def test_row_sums(device, monkeypatch, rows, columns, weighted):
    """The tile of the GPUs, over several tiles a side; also into a part of another tensor."""
    monkeypatch.setattr(row_sums, "INTERPRETER_LAUNCH", row_sums.LAUNCH)
    draw = Draw(0, torch.float32, device)
    wide, weights = draw.normal(rows, columns + 3), draw.normal(rows) if weighted else None
    x = wide[:, :columns]
    expected = (x.double() if weights is None else x.double() * weights.double()[:, None]).sum(0)
    actual = row_sums.row_sums(x, torch.float32, weights)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    out = torch.ones(columns + 2, dtype=torch.float16, device=device)
    row_sums.row_sums(x, torch.float16, weights, out=out[1:-1])
    torch.testing.assert_close(out[1:-1], expected.half(), rtol=1e-3, atol=1e-3)
    assert out[0] == out[-1] == 1
