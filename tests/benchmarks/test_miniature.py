"""The paper's table in miniature: its statistics against numpy's, its verdicts, and that a killed table goes on."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import miniature, timm_loop
from benchmarks.paper import rows, table, teacher, training
from benchmarks.paper.rows import Claim, Score
from benchmarks.paper.tokens import cosines
from deitfast.cli.recipes import load_recipe
from deitfast.data import IMAGENET_MEAN, IMAGENET_STD
from deitfast.engine.teacher import load_teacher
from deitfast.errors import DeitfastError
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe
from deitfast.recipes.mini_cifar10 import RECIPE as WHOLE
from deitfast.recipes.mini_cifar10_cpu import RECIPE as ON_CPU
from deitfast.training.launch import parse_flags
from deitfast.training.train import train as train_until

SEEDS = range(3)


def results(**top1: list[tuple[float, float]]) -> table.Results:
    """Files of runs by name: (raw, ema) by seed."""
    return {
        run: {seed: {"scores": {"raw": {"top1": raw}, "ema": {"top1": ema}}} for seed, (raw, ema) in enumerate(scores)}
        for run, scores in top1.items()
    }


def test_a_difference_of_two_runs_has_both_spreads() -> None:
    one, two = np.array([50.0, 51.5, 52.0]), np.array([48.0, 48.5, 50.5])
    found = table.difference(
        results(one=[(0, v) for v in one], two=[(0, v) for v in two]), Claim("", Score("one"), Score("two")), SEEDS
    )
    assert found.mean == pytest.approx(one.mean() - two.mean())
    assert found.error == pytest.approx(np.sqrt(one.var(ddof=1) / 3 + two.var(ddof=1) / 3))


def test_two_scores_of_one_run_are_compared_seed_by_seed() -> None:
    pairs = [(40.0, 40.5), (50.0, 50.7), (60.0, 60.6)]
    found = table.difference(results(one=pairs), Claim("", Score("one"), Score("one", "raw")), SEEDS)
    apart = np.array([0.5, 0.7, 0.6])
    assert found.mean == pytest.approx(apart.mean())
    assert found.error == pytest.approx(apart.std(ddof=1) / np.sqrt(3))


@pytest.mark.parametrize(
    ("mean", "equal", "verdict"),
    [
        (2.1, False, table.HOLDS), (1.9, False, table.DOES_NOT), (-2.1, False, table.WRONG_WAY),
        (1.9, True, table.HOLDS), (-2.1, True, table.DOES_NOT), (None, False, table.NOT_RUN),
    ],
)  # fmt: skip
def test_a_claim_holds_beyond_two_standard_errors(mean: float | None, equal: bool, verdict: str) -> None:
    error = None if mean is None else 1.0
    assert table.Difference(mean, error, 3).verdict(Claim("", Score("a"), Score("b"), equal)) == verdict


@pytest.mark.parametrize("base", [WHOLE, ON_CPU], ids=["whole", "cpu"])
def test_every_claim_speaks_of_runs_of_the_table_in_the_right_direction(base: Recipe) -> None:
    runs = {run.name: run for run in rows.runs(base)}
    assert len(runs) == len(rows.runs(base))
    for claim in rows.claims(base):
        assert {claim.better.run, claim.worse.run} <= runs.keys()
    for factor in rows.FACTORS:
        claim = next(c for c in rows.claims(base) if c.text == factor.claim)
        with_it, without = (replace(base, **runs[score.run].changes) for score in (claim.better, claim.worse))
        assert factor.is_on(with_it)
        assert not factor.is_on(without)


@pytest.mark.parametrize("name", ["mini_cifar10", "mini_cifar10_cpu"])
def test_every_run_is_a_recipe_that_can_run_and_its_command_repeats_it(name: str, tmp_path: Path) -> None:
    stated = load_recipe(name)
    made = training.Table(name, miniature.seen_as_long(replace(stated, data="x"), 4), tmp_path, 1, teacher_width=8)
    for run in rows.runs(made.recipe):
        recipe = training.recipe_of(made, run, 1)
        recipe.check()
        assert recipe.seed == 1
        given = shlex.split(training.command(made, recipe))[3:]
        assert replace(parse_flags(stated, given), out=recipe.out) == recipe


def test_more_images_are_seen_in_as_many_steps() -> None:
    longer = miniature.seen_as_long(ON_CPU, 208 / miniature.PER_CLASS["mini_cifar10_cpu"])
    assert 10 * 208 // 64 * longer.epochs == pytest.approx(8 * ON_CPU.epochs, rel=0.01)


def test_the_convnet_is_a_teacher_that_the_engine_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = teacher.convnet(classes=3, width=4).eval()
    teacher.export(network, tmp_path / "t.pt2", image_size=16)
    recipe = replace(Recipe(), teacher=str(tmp_path / "t.pt2"), distillation="hard")
    images = torch.randn(5, 3, 16, 16)
    loaded = load_teacher(recipe, ("a", "b", "c"), torch.device("cpu"), 16)
    torch.testing.assert_close(loaded(images), network(images))


def test_augmented_images_are_windows_of_the_padded_ones_some_mirrored() -> None:
    images = torch.arange(8 * 3 * 8 * 8).reshape(8, 3, 8, 8).remainder(251).to(torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    made = teacher.augmented(images, torch.Generator().manual_seed(0)).mul(std).add(mean).mul(255).round()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    mirrored = 0
    for i in range(8):
        windows = [padded[i, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        plain, flipped = (
            any(np.array_equal(made[i].numpy(), window[..., ::step]) for window in windows) for step in (1, -1)
        )
        assert plain or flipped
        mirrored += flipped
    assert 0 < mirrored < 8


def test_a_row_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DeitfastError, match=r"row 'bases' unknown\. Did you mean base"):
        miniature.chosen(rows.runs(ON_CPU), "bases")


@pytest.mark.slow
def test_every_row_runs_for_a_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert miniature.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    for run in rows.runs(ON_CPU):
        assert f"| {run.name}, ema | {table.NOT_RUN}" not in printed
        assert f"| {run.name}, ema | " in printed


def test_a_table_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its second run: the first is not run again, the second from its newest checkpoint on."""
    arguments = ["--data", "digits", "--rows", "base,bf16", "--seeds", "1", "--out", str(tmp_path)]
    small = replace(ON_CPU, batch=32, mix_group=32, micro_batch=32, epochs=4, eval_every=4, warmup_epochs=1.0)
    for module in (miniature, training):
        monkeypatch.setattr(module, "load_recipe", lambda _: small)
    monkeypatch.setitem(miniature.PER_CLASS, "mini_cifar10_cpu", 8)
    begun: list[str] = []
    train = training.deitfast.train

    def killed_in_the_second(recipe: Recipe):
        begun.append(recipe.precision)
        if len(begun) != 2:
            return train(recipe)
        train_until(recipe, stop_at=5)
        raise SystemExit(75)

    monkeypatch.setattr(training.deitfast, "train", killed_in_the_second)
    with pytest.raises(SystemExit):
        miniature.main(arguments)
    assert miniature.main(arguments) == 0
    assert begun == ["auto", "bf16", "bf16"]
    done = json.loads((tmp_path / "bf16-0.json").read_text())
    assert done["steps"] == 8
    assert done["images"] == 3 * 32  # of the last start
    assert "| bf16, ema |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").exists()


def test_a_start_that_was_written_down_on_another_machine_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = training.Table("mini_cifar10_cpu", ON_CPU, tmp_path, 1, teacher_width=8)
    made.file("base", 0).write_text("{}")
    trained: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        training, "train", lambda table, run, s: trained.append((run.name, table.file(run.name, s).exists()))
    )
    training.make_ready(made, rows.Run("larger", start="base"), 0)
    (made.folder("base", 0) / "best").mkdir(parents=True)
    made.file("base", 0).write_text("{}")
    training.make_ready(made, rows.Run("larger", start="base"), 0)
    assert trained == [("base", False), ("base", True)]


def test_the_tokens_are_compared_as_timm_has_them(timm, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = create_model("deit_micro_distilled_patch4_32", num_classes=3, image_size=16).eval()
    theirs = timm.models.deit.VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=3
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(6, 3, 16, 16)
    outputs = theirs.get_intermediate_layers(images, n=4, return_prefix_tokens=True)
    expected = [torch.cosine_similarity(prefix[:, 0], prefix[:, 1], dim=-1).mean().item() for _, prefix in outputs]
    assert cosines(ours, images)[1:] == pytest.approx(expected, abs=1e-5)
    learned = torch.cosine_similarity(ours.cls_token.flatten(), ours.dist_token.flatten(), dim=0)
    assert cosines(ours, images)[0] == pytest.approx(learned.item(), abs=1e-6)


def test_timms_loop_trains_a_network_of_the_same_tensors_and_refuses_what_timm_has_not() -> None:
    ours, theirs = create_model(ON_CPU.model, num_classes=3, image_size=16), timm_loop.network(ON_CPU, 3)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    with pytest.raises(DeitfastError, match="has no repeats 3"):
        timm_loop.train(replace(ON_CPU, repeats=3))
