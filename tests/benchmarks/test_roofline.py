"""The roofline on paper against published multiply-adds and torch's own FLOP counter."""

from __future__ import annotations

import pytest

from benchmarks import roofline
from benchmarks.measuring.counted import counted_flops, counted_launches
from deitfast.errors import DeitfastError
from deitfast.kernels.catalogue import Shape
from deitfast.kernels.common import INTERPRETED
from deitfast.model import work
from deitfast.model.zoo import VARIANTS, find_variant

PUBLISHED = {"deit_tiny": 1.26, "deit_small": 4.61, "deit_base": 17.58, "deit_base_384": 55.54}
"""10^9 multiply-adds of a forward pass: timm's tables for ViT-Ti, S, B at 224 px and B at 384."""
ATTENTION = ("attention backward", "last attention backward")


@pytest.mark.parametrize(("model", "gmacs"), PUBLISHED.items())
def test_multiply_adds_are_the_published_ones(model, gmacs):
    assert work.forward_macs(model) / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_ops_of_a_step_add_up_to_what_torch_counts(model):
    name = work.full_name(model)
    ops = work.step_ops(find_variant(name), 1)
    products = sum(op.count * op.flops for op in ops if op.part != "norm")
    # Eager attention on the meta device keeps its scores, so its backward has four products, not five: so has the last
    # block's in either way, whose attention is PyTorch's.
    kept, last = (sum(op.count * op.flops for op in ops if op.name == name) / 5 for name in ATTENTION)
    assert counted_flops(name, fused=True, backward=True) == pytest.approx(products - last, rel=1e-6)
    assert counted_flops(name, fused=False, backward=True) == pytest.approx(products - kept - last, rel=1e-6)
    again = sum(op.count * op.flops for op in work.step_ops(find_variant(name), 1, recompute=True) if op.part != "norm")
    for fused, missing in ((True, last), (False, kept + last)):
        counted = counted_flops(name, fused=fused, backward=True, recompute=True)
        assert counted == pytest.approx(again - missing, rel=1e-6)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_last_block_saves_its_share_of_the_forward(model):
    """All but keys and values: at 224 px about a twelfth of five sixths."""
    whole, counted = 2 * work.forward_macs(model), counted_flops(work.full_name(model), fused=True)
    variant = find_variant(work.full_name(model))
    D, N = variant.width, variant.tokens
    assert whole - counted == (N - 1) * (2 * D * 10 * D + 4 * N * D)


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.params_millions])
def test_parameters_are_the_published_ones(name):
    variant = find_variant(name)
    assert variant.parameters(work.CLASSES) / 1e6 == pytest.approx(variant.params_millions, abs=0.006)


def test_a_distilled_model_counts_its_token_and_head():
    name = "deit_tiny_distilled_patch16_224"
    ops = work.step_ops(find_variant(name), 1)
    forward = sum(op.count * op.flops for op in ops if op.name.endswith("forward") and op.part != "norm")
    assert counted_flops(name, fused=False) == pytest.approx(forward, rel=1e-6)


def test_names_are_completed_and_mistakes_named():
    assert work.full_name("deit_base_384") == "deit_base_patch16_384"
    assert work.short_name("deit_base_patch16_384") == "deit_base_384"
    assert work.full_name("deit_tiny_distilled") == "deit_tiny_distilled_patch16_224"
    with pytest.raises(DeitfastError, match=r"'deit_bse' unknown\. Did you mean deit_base"):
        work.full_name("deit_bse")


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    compute, memory = work.Op("a", "norm", 4e6, 1e3, 3), work.Op("b", "norm", 1e3, 4e3)
    assert compute.floor_us(2.0, 1.0) == pytest.approx(6.0)
    assert (compute.bound(2.0, 1.0), memory.bound(2.0, 1.0)) == ("compute", "memory")
    assert memory.floor_us(2.0, 1.0) == pytest.approx(4.0)
    floors = work.part_floors("deit_base", 512, 2.0, 1e9)
    products = 2 * sum(x for part, x in floors.items() if part.startswith("GEMM"))  # compute bound at 2 TFLOP/s
    last = 2 * 768**2 * 197 + 10 * 768**2  # keys and values of all tokens, the rest of one
    assert products * 1e6 == pytest.approx(3 * 2 * (11 * 12 * 768**2 * 197 + last))


def test_the_plan_is_made_of_the_counts_and_of_rates_below_the_datasheets():
    variant, gpu = find_variant(roofline.PLANNED_MODEL), roofline.PLANNED_GPU
    ops = work.step_ops(variant, roofline.PLANNED_BATCH) + roofline._extra_ops(variant)
    assert {op.part for op in ops} == set(work.PARTS)
    assert roofline.ACHIEVED.keys() <= {op.name for op in ops}
    for op in ops:
        assert roofline.planned_us(op) >= op.floor_us(gpu.tflops, gpu.gbps), op
    plan = roofline.plan()
    taken = sum(lever.us for lever in roofline.LEVERS if lever.built and lever.part != "gaps")
    assert sum(plan.values()) - plan["gaps"] + taken == pytest.approx(sum(map(roofline.planned_us, ops)))
    floors = work.part_floors(roofline.PLANNED_MODEL, roofline.PLANNED_BATCH, gpu.tflops, gpu.gbps)
    assert all(floors[part] < plan[part] for part in floors)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has launches of its own")
def test_the_kernels_of_a_step_are_counted():
    launches = counted_launches(Shape.of("B", 197, roofline.PLANNED_BATCH))
    assert launches["attention_fwd_short"] == launches["attention_bwd_short"] == 1
    assert launches["layernorm_bwd"] == launches["layernorm_linear"] == 2
    nodes = roofline.graph_nodes(find_variant(roofline.PLANNED_MODEL))
    assert 12 * launches.total() < nodes < 12 * (launches.total() + 20) + roofline.OTHER_NODES + 8


def test_rates_become_hours_and_mfu():
    # 300 x 1,281,167 images in one day need 4,448.5 images/s.
    assert work.hours_for_imagenet(4448.5) == pytest.approx(24, abs=0.01)
    assert work.mfu(1e12 / work.model_flops("deit_base"), "deit_base", 2.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_datasheet_is_found_by_the_device_name(device, name):
    gpu = work.gpu_of(device)
    assert (gpu and gpu.name) == name


def test_the_command_prints_the_table_and_one_line_for_a_mistake(capsys):
    assert roofline.main(["--model", "deit_base", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "17.56 G multiply-adds" in out
    total = sum(roofline.plan().values())
    assert f"{'reached' if total <= 200 else 'not reached'} on paper: {total:.1f}" in out
    assert out.count("open: would give") == sum(not lever.built for lever in roofline.LEVERS)
    assert roofline.main(["--model", "deit_bse"]) == 2
    assert capsys.readouterr().err.startswith("roofline: model 'deit_bse' unknown.")
    assert roofline.main(["--batch", "0"]) == 2
