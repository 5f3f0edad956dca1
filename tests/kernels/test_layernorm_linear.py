"""LayerNorm and the linear layer after it as one kernel: what it computes, where it is chosen, what is launched."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deitfast.kernels import layernorm_linear
from deitfast.kernels.catalogue import MODELS, Draw, Shape
from deitfast.kernels.catalogue import OPS as CATALOGUE
from deitfast.kernels.common import INTERPRETED, Launch, record
from deitfast.kernels.gemm import LAUNCHES
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv
from deitfast.kernels.tunable import selection
from tests.kernels.linear_ops import HALVES, OPS, Op, check
from tests.ptx.kernels import compiled_kernels, needs_engine

recorded = pytest.mark.skipif(INTERPRETED, reason="the interpreter has launches of its own")


def one_kernel_whatever_the_size(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """columns: of the tiles."""

    def always(arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool) -> Launch:
        return layernorm_linear._one_kernel(LAUNCHES[arch][2, columns], K)

    monkeypatch.setattr(layernorm_linear, "layernorm_linear_launch", always)
    monkeypatch.setattr(layernorm_linear, "fills", lambda arch, M: True)


@needs_engine
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("name", "arch", "columns"),
    [("layernorm_qkv", 80, 64), ("layernorm_qkv", 90, 64), ("layernorm_mlp", 90, 256)],
    ids=["qkv sm_80", "qkv sm_90", "mlp sm_90"],
)
def test_as_compiled_code(monkeypatch, name, arch, columns):
    """Two blocks of rows, the second not full, and several tiles of columns; in any order of warps, without a race."""
    one_kernel_whatever_the_size(monkeypatch, columns)
    with compiled_kernels(arch, races=True) as gpu:
        inputs = OPS[name].inputs(Draw(0, torch.bfloat16), (2, 66), 96, 320)
        inputs.pop("gamma", None)  # so that gelu has drop-path's factor
        check(OPS[name], inputs)
    ran = Counter(launch.kernel for launch in gpu.launches)
    assert ran["layernorm_linear_kernel"] == 1
    assert "layernorm_fwd_kernel" not in ran


@needs_engine
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("name", "arch"), [("layernorm_attention", 90), ("layernorm_mlp", 80)], ids=["attention sm_90", "mlp sm_80"]
)
def test_for_a_subset_of_the_samples(monkeypatch, name, arch):
    one_kernel_whatever_the_size(monkeypatch, columns=64)
    op: Op = HALVES[name]
    options = {"num_heads": 2} if name == "layernorm_attention" else {}
    inputs = op.inputs(Draw(1, torch.bfloat16), (5, 33), 64, 96) | {"path_scale": None}
    with compiled_kernels(arch, races=True) as gpu:
        check(op, inputs, subset=torch.tensor([0, 1, 4]), subset_scale=1.25, **options)
    assert Counter(launch.kernel for launch in gpu.launches)["layernorm_linear_kernel"] == 1


@needs_engine
def test_rows_are_written_before_tma_reads_them(monkeypatch):
    """The machine of tests/ptx has one memory for both ways to it; a chip wants a fence, then a barrier, in between."""
    one_kernel_whatever_the_size(monkeypatch, columns=64)
    ran: list[str] = []
    with compiled_kernels(90, change=lambda ptx: (ran.append(ptx), ptx)[1]):
        layernorm_qkv(**OPS["layernorm_qkv"].inputs(Draw(0, torch.bfloat16), (2, 66), 96, 320))
    (ptx,) = (text for text in ran if "layernorm_linear_kernel" in text)
    before_reads = ptx[: ptx.index("cp.async.bulk.tensor")]
    writes, fence, rest = before_reads.partition("fence.proxy.async;")
    assert "st.global" in writes
    assert fence
    assert "bar.sync" in rest
    assert "st.global" not in rest


@recorded
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_layernorm_qkv_launches_one_kernel_and_its_backward_these(model, arch):
    """At the recipe's batch on one GPU. What else the backward does are plain products: cuBLAS's."""
    op, shape = CATALOGUE["layernorm_qkv"], Shape.of(model, tokens=197, batch=512)
    with FakeTensorMode(), record(arch) as launches:
        inputs = op.inputs(Draw(0, torch.bfloat16), replace(shape, batch=1))
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        x = torch.empty(*shape.leading, shape.width, dtype=torch.bfloat16, requires_grad=True)
        launches.clear()
        out = op.function(**leaves | {"x": x})
        forward = [launch.kernel.__name__ for launch in launches]
        launches.clear()
        out.backward(torch.empty_like(out))
        backward = Counter(launch.kernel.__name__ for launch in launches)
    assert forward == ["layernorm_linear_kernel"]
    assert backward == {
        "scale_and_sum_kernel": 1,  # the sums of dout, the bias gradient
        "layernorm_bwd_kernel": 1,
        "row_sums_kernel": 2,  # partial sums added up: of the bias, and of the LayerNorm's weight and bias at once
    }


@pytest.mark.parametrize(
    ("arguments", "one"),
    [
        ((90, 2, 2304, 768, "linear", True), True),
        ((90, 2, 3072, 768, "gelu", True), True),
        ((80, 2, 3072, 768, "gelu", True), True),
        ((90, 2, 3840, 1280, "linear", True), False),  # the blocks at work take 43 MB
        ((100, 2, 3840, 1280, "linear", True), True),
        ((90, 2, 2304, 768, "linear", False), False),
        ((90, 4, 2304, 768, "linear", True), False),
        ((0, 2, 2304, 768, "linear", True), False),
    ],
)
def test_where_it_is_chosen(arguments, one):
    found = selection(layernorm_linear.layernorm_linear_launch, *arguments)
    assert (found.own is not None) == one
    assert one == (None in found.others), "two kernels are offered where one is the choice"
    for entry in (found.own, *found.others):
        assert entry is None or entry.tiles["BLOCK_M"] % entry.tiles["ROWS"] == 0


@pytest.mark.parametrize(("samples", "whether"), [(512, True), (1024, True), (128, False), (2, False), (0, False)])
def test_rows_enough(samples, whether):
    """788 blocks of rows are six rounds of an H100's 132 multiprocessors; 197 are one and a half."""
    assert layernorm_linear.fills(90, samples * 197) == whether
