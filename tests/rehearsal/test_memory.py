"""What a run takes of the GPU's memory, and what is planned for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deitfast.distributed import World
from deitfast.engine.memory import evaluated_image_bytes, free_bytes, image_parts, largest_micro_batch
from deitfast.engine.teacher import load_teacher
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe
from deitfast.training import first_contact
from deitfast.training.run import set_up
from deitfast.use import evaluate
from deitfast.verification.verdict import Verdict
from tests.rehearsal import cuda
from tests.rehearsal.test_train import RECIPE

WORLD = World(0, 1, 0, torch.device("cuda", 0))
BASE = Recipe(model="deit_base_patch16_224", batch=4096)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What mem_get_info says, to be changed."""
    monkeypatch.setattr(cuda, "MEMORY", dict(cuda.MEMORY))
    return cuda.MEMORY


def test_what_torch_keeps_in_its_cache_counts_as_free(free: dict[str, int]) -> None:
    model = create_model("deit_digits_patch4_16", num_classes=10)
    before = largest_micro_batch(model, RECIPE, WORLD, True)
    free["free"] -= 40_000_000_000
    free["cached"] = 40_000_000_000  # of an earlier run in this process
    assert largest_micro_batch(model, RECIPE, WORLD, True) == before
    free["cached"] = 0
    assert largest_micro_batch(model, RECIPE, WORLD, True) < before


def test_the_micro_batch_leaves_room_for_teacher_and_evaluation(free: dict[str, int]) -> None:
    model = create_model(BASE.model)
    trained, evaluated = sum(image_parts(model, BASE, True).values()), evaluated_image_bytes(model, True)
    for free["free"] in (20 << 30, 79 << 30):
        alone = largest_micro_batch(model, BASE, WORLD, True)
        assert alone * trained + min(alone, 256) * evaluated < 0.9 * free_bytes(WORLD.device)
        wide = largest_micro_batch(model, BASE, WORLD, True, teacher_image_bytes=2 * trained)
        assert wide == pytest.approx(alone / 2, rel=0.2)
        assert largest_micro_batch(model, BASE, WORLD, True, teacher_image_bytes=trained // 2) == alone


def test_evaluation_takes_no_more_than_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Graphed", lambda forward, device, size: forward)  # a recording keeps every tensor
    model = create_model("deit_tiny_patch16_224", depth=2).to("cuda").eval()
    images = torch.zeros(8, 224, 224, 3, dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        evaluate._forward(model, WORLD, len(images), bf16=True)(images)
        peak = torch.cuda.max_memory_allocated() - before
    weights = 2 * sum(p.numel() for p in model.parameters())
    assert peak <= weights + 8 * evaluated_image_bytes(model, True)
    assert peak > 8 * evaluated_image_bytes(model, True) // 2  # nor much less


def test_a_run_is_planned_with_its_teacher_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "deitfast.training.run.largest_micro_batch", lambda *arguments: seen.append(arguments[-1]) or 32
    )
    monkeypatch.setattr(first_contact, "verify", lambda *_: Verdict())
    recipe = replace(RECIPE, out=str(tmp_path), distillation="hard", teacher="deit_digits_patch4_16:fresh")
    run, data = set_up(recipe, depth=2)
    assert run.folder is not None
    run.folder.close()
    teacher = load_teacher(recipe, data.classes, WORLD.device, 16)
    assert seen == [teacher.image_bytes()]
    assert load_teacher(recipe, data.classes, torch.device("cpu"), 16).image_bytes() == 0
    assert seen[0] > 17 * 128 * 4  # its tokens in fp32
    assert run.eval_batch == 32
    assert replace(run, micro_batch=1024).eval_batch == 256
