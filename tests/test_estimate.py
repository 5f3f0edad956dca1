"""`deitfast estimate` beside what a step on a CPU really holds, and beside the roofline worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deitfast.cli.main import main
from deitfast.engine.flat import FlatState
from deitfast.errors import DeitfastError
from deitfast.kernels.common import INTERPRETED
from deitfast.model.factory import create_model
from deitfast.model.work import GPUS
from deitfast.recipe import Recipe
from deitfast.training.estimate import estimate, least_hours, memory_parts

RECIPE = Recipe(model="deit_base_patch16_224", data="x")


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Of the memories behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.skipif(INTERPRETED, reason="what is held does not depend on who computes it")
@pytest.mark.parametrize(("micro_batch", "recompute"), [(2, False), (16, False), (16, True)])
def test_the_formula_is_within_a_twentieth_of_what_a_step_holds(micro_batch: int, recompute: bool) -> None:
    """Between forward and backward of a step through the fused ops, fp32, when a step holds most."""
    model = create_model("deit_small_patch16_224", num_classes=100, depth=4, fused=True)
    for block in model.blocks:
        block.recompute = recompute
    expected = memory_parts(model, replace(RECIPE, recompute=recompute), micro_batch, accumulates=False, bf16=False)
    del expected["the backward of a block"]  # not there yet

    flat = FlatState(model, RECIPE)
    compute = flat.compute_model()
    compute.train()
    images = torch.zeros(micro_batch, 224, 224, 3, dtype=torch.uint8)
    patches = torch.randn(micro_batch, 196, 768)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits = compute(patches, None)
    state = [flat.master, flat.exp_avg, flat.exp_avg_sq, flat.ema, flat.grad]
    held = bytes_of([images, patches, logits, *saved, *(buffer for buffer in state if buffer is not None)])
    assert sum(expected.values()) == pytest.approx(held, rel=0.05)


def test_what_runs_at_once_is_the_batch_and_fits() -> None:
    for gpus in (1, 8):
        for key in ("h100", "a100"):
            found = estimate(RECIPE, GPUS[key], gpus, 1000, 1_281_167)
            assert found.micro_batch * found.accumulation * gpus == 1024
            assert found.micro_batch <= found.largest
            assert sum(found.memory.values()) < 1e9 * GPUS[key].gigabytes
    small = replace(GPUS["h100"], gigabytes=16)
    assert estimate(RECIPE, small, 1, 1000, 1_281_167).largest < found.largest / 4


def test_recomputing_saves_the_hidden_layers_and_costs_fc1() -> None:
    """DeiT-B in bf16: LayerNorm's row (768), gelu and gelu' (3,072 each) of a token, in eleven blocks and one row."""
    kept, again = (estimate(replace(RECIPE, recompute=on), GPUS["h100"], 1, 1000, 1_281_167) for on in (False, True))
    name, tokens = "kept for the backward", 11 * 197 + 1
    saved = kept.memory[name] / kept.micro_batch - again.memory[name] / again.micro_batch
    assert saved == tokens * (2 * (768 + 2 * 3072) + 2 * 4)
    fc1 = tokens * 2 * 768 * 3072 / 989.4e12
    assert fc1 < 1 / again.images_per_second - 1 / kept.images_per_second < 1.3 * fc1


def test_hours_are_images_over_the_bound() -> None:
    one, eight = (estimate(RECIPE, GPUS["h100"], gpus, 1000, 1_281_167) for gpus in (1, 8))
    # A step of DeiT-B is 105.4 GFLOP an image, of which the last block saves a twelfth of five sixths: no H100 of 989.4
    # TFLOP/s does more than so many a second.
    assert one.images_per_second < 989.4e12 / (105.4e9 * (1 - 5 / 6 / 12))
    assert one.images_per_second > 0.7 * 989.4e12 / 105.4e9
    assert one.hours == pytest.approx(300 * 1_281_167 / one.images_per_second / 3600)
    assert least_hours(RECIPE, GPUS["h100"], 1_281_167) == one.hours, "what the table of recipes states"
    assert 6 < one.hours / eight.hours <= 8.001
    assert one.parameters == 86_567_656  # timm's count
    wide = estimate(replace(RECIPE, image_size=384), GPUS["h100"], 8, 1000, 1_281_167)
    assert wide.macs / one.macs == pytest.approx(55.54 / 17.58, rel=0.01)  # as published
    assert wide.images_per_second < eight.images_per_second / 2


def test_the_command_says_that_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", "deit_tiny", "--gpus", "2", "--gpu", "h200", "--price", "3", "--epochs", "100"])
    said = capsys.readouterr().out
    assert "5.72 M parameters, 1.25 G multiply-adds" in said
    assert "for 100 epochs" in said
    assert "a prediction" in said
    assert "Not a measurement" in said
    assert "batch 1024 = 2 GPU(s) x 1 accumulated x 512" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "0"], "--gpus is 0, must be at least 1"),
        (["--bacth", "64"], "Did you mean --batch?"),
        (["--gpus", "7"], "does not give 7 processes"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "deit_tiny", *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(DeitfastError, match="deit_bse"):
        estimate(replace(RECIPE, model="deit_bse"), GPUS["h100"], 1, 10, 10)
