"""Every file in recipes/: its values against the facts, stated here a second time, and each of them in effect."""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import subprocess
import sys
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deitfast.data import Order, draws
from deitfast.data.augmentation import Augmentation
from deitfast.engine.optim import learning_rate, parameter_groups
from deitfast.model.factory import create_model
from deitfast.model.zoo import find_variant
from deitfast.recipe import Recipe
from tests import processes

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes").glob("[!_]*.py"))

# The DeiT paper's table 9 and the defaults of the authors' main.py.
DEIT = {
    "optimizer": "adamw", "epochs": 300, "batch": 1024, "lr": 5e-4 * 1024 / 512, "min_lr": 1e-5, "warmup_lr": 1e-6,
    "warmup_epochs": 5, "weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "clip_norm": 0,
    "ema_decay": 0.99996, "drop_path": 0.1, "drop_path_schedule": "linear", "drop_path_form": "bernoulli",
    "layer_scale": 0, "loss": "ce", "smoothing": 0.1, "distillation": "none", "teacher": "", "repeats": 3,
    "crop_min": 0.08, "crop_max": 1, "flip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0,
    "mixup": 0.8, "cutmix": 1, "mix_probability": 1, "mix_switch": 0.5, "mix_group": 128, "erase": 0.25,
    "eval_crop_ratio": 0.875, "image_size": 0, "init": "", "reset_head": False, "deit_compat": False,
}  # fmt: skip
# Section 4 of the paper, losses.py, README_deit.md.
DISTILLED = {"distillation": "hard", "distillation_alpha": 0.5, "teacher": "regnety_160.deit_in1k"}
# README_deit.md's command for 384 px; engine.py's evaluation mode is drop-path 0.
AT_384 = {
    "epochs": 30, "batch": 32 * 16, "lr": 5e-6, "min_lr": 5e-6, "weight_decay": 1e-8, "drop_path": 0, "mix_group": 32,
}  # fmt: skip
# README_revenge.md's commands at b001f95, test crop 1.0 included; max_grad_norm of apex's fused_lamb.py is 1.
DEIT3 = DEIT | {
    "optimizer": "lamb", "epochs": 800, "batch": 256 * 8, "lr": 3e-3, "drop_path": 0.2, "clip_norm": 1, "loss": "bce",
    "drop_path_schedule": "constant", "layer_scale": 1e-4, "smoothing": 0, "rand_augment": "three",
    "color_jitter": 0.3, "mix_group": 256, "erase": 0, "eval_crop_ratio": 1,
}  # fmt: skip
DEIT3_FINE_TUNE = DEIT3 | {
    "optimizer": "adamw", "epochs": 20, "batch": 64 * 8, "lr": 1e-5, "weight_decay": 0.1, "clip_norm": 0, "loss": "ce",
    "smoothing": 0.1, "repeats": 1, "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0, "mix_group": 64,
}  # fmt: skip
# The authors' answers in their repository: issue 45 (CIFAR-10, Cars), 105 and 141 (iNaturalist: the final rate).
FROM_IMAGENET = {"batch": 768, "init": "runs/deit_base/best", "reset_head": True, "mix_group": 96}
SGD = FROM_IMAGENET | {
    "optimizer": "sgd", "epochs": 1000, "lr": 0.01, "weight_decay": 1e-4, "drop_path": 0, "erase": 0,
}  # fmt: skip
INAT = FROM_IMAGENET | {"epochs": 360, "lr": 7.5e-5, "erase": 0.1}
# big_vision/configs/vit_s16_i1k.py: 10,000 steps of warm-up, decay 1e-4 beside a rate of 1e-3, clipped at 1, no EMA.
BIG_VISION = DEIT | {
    "epochs": 90, "min_lr": 0, "warmup_lr": 0, "warmup_epochs": 8, "weight_decay": 1e-4 / 1e-3, "clip_norm": 1,
    "ema_decay": 0, "drop_path": 0, "smoothing": 0, "repeats": 1, "crop_min": 0.05, "rand_augment": "rand-m10",
    "mixup": 0.2, "cutmix": 0, "mix_group": 1024, "erase": 0,
}  # fmt: skip
# configs/deit of mmpretrain.
MMPRETRAIN = {"repeats": 1, "warmup_epochs": 20, "clip_norm": 5}
# Ours: the paper's for 512 images a step, and what 800 steps on 520 images bear of it.
MINI = DEIT | {"batch": 512, "lr": 5e-4, "ema_decay": 0.9995, "eval_crop_ratio": 1, "eval_every": 10}
MINI_ON_CPU = {
    "image_size": 16, "epochs": 60, "batch": 64, "lr": 1e-3, "min_lr": 2e-4, "ema_decay": 0.98, "drop_path": 0,
    "smoothing": 0, "repeats": 1, "crop_min": 0.6, "rand_augment": "none", "mix_probability": 0.5, "mix_group": 64,
    "erase": 0, "eval_every": 60, "micro_batch": 64, "workers": 1,
}  # fmt: skip


def after(run: str, **more: object) -> dict:
    return {"init": f"runs/{run}/best", **more}


TABLE: dict[str, tuple[str, dict]] = {
    "deit_tiny": ("deit_tiny_patch16_224", DEIT),
    "deit_small": ("deit_small_patch16_224", DEIT),
    "deit_base": ("deit_base_patch16_224", DEIT),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", DEIT | DISTILLED),
    "deit_small_distilled": ("deit_small_distilled_patch16_224", DEIT | DISTILLED),
    "deit_base_distilled": ("deit_base_distilled_patch16_224", DEIT | DISTILLED),
    "deit_tiny_distilled_1000": ("deit_tiny_distilled_patch16_224", DEIT | DISTILLED | {"epochs": 1000}),
    "deit_small_distilled_1000": ("deit_small_distilled_patch16_224", DEIT | DISTILLED | {"epochs": 1000}),
    "deit_base_distilled_1000": ("deit_base_distilled_patch16_224", DEIT | DISTILLED | {"epochs": 1000}),
    "deit_base_384": ("deit_base_patch16_384", DEIT | AT_384 | after("deit_base")),
    "deit_base_distilled_384": (
        "deit_base_distilled_patch16_384", DEIT | DISTILLED | AT_384 | after("deit_base_distilled_1000"),
    ),
    "deit3_small": ("deit3_small_patch16_224", DEIT3 | {"image_size": 224, "lr": 4e-3, "drop_path": 0.05}),
    "deit3_base": ("deit3_base_patch16_224", DEIT3 | {"image_size": 192}),
    "deit3_large": ("deit3_large_patch16_224", DEIT3 | {"image_size": 192, "drop_path": 0.45, "mix_group": 64}),
    # 160 px hold 11 patches of 14, which are 154.
    "deit3_huge": ("deit3_huge_patch14_224", DEIT3 | {"image_size": 154, "drop_path": 0.6, "mix_group": 64}),
    "deit3_base_224": ("deit3_base_patch16_224", DEIT3_FINE_TUNE | after("deit3_base")),
    "deit3_large_224": ("deit3_large_patch16_224", DEIT3_FINE_TUNE | after("deit3_large", drop_path=0.45)),
    "deit3_huge_224": ("deit3_huge_patch14_224", DEIT3_FINE_TUNE | after("deit3_huge", drop_path=0.55, mix_group=32)),
    "deit3_small_384": ("deit3_small_patch16_384", DEIT3_FINE_TUNE | after("deit3_small", drop_path=0)),
    "deit3_base_384": ("deit3_base_patch16_384", DEIT3_FINE_TUNE | after("deit3_base")),
    "deit3_large_384": ("deit3_large_patch16_384", DEIT3_FINE_TUNE | after("deit3_large", drop_path=0.45)),
    "transfer_cifar10": ("deit_base_patch16_224", DEIT | SGD),
    "transfer_cifar100": ("deit_base_patch16_224", DEIT | SGD),
    "transfer_flowers102": ("deit_base_patch16_224", DEIT | SGD),
    "transfer_cars": ("deit_base_patch16_224", DEIT | SGD),
    "transfer_inat18": ("deit_base_patch16_224", DEIT | INAT),
    "transfer_inat19": ("deit_base_patch16_224", DEIT | INAT),
    "mini_cifar10": ("deit_mini_patch4_32", MINI),
    "mini_cifar10_cpu": ("deit_micro_patch4_32", MINI | MINI_ON_CPU),
    "mmpretrain_deit_tiny": (
        "deit_tiny_patch16_224", DEIT | MMPRETRAIN | {"drop_path": 0, "ema_decay": 0, "mix_group": 256},
    ),
    "mmpretrain_deit_small": (
        "deit_small_patch16_224", DEIT | MMPRETRAIN | {"drop_path": 0, "ema_decay": 0, "mix_group": 256},
    ),
    "mmpretrain_deit_base": ("deit_base_patch16_224", DEIT | MMPRETRAIN | {"mix_group": 64}),
    "vit_small_90": ("deit_small_patch16_224", BIG_VISION),
}  # fmt: skip
# Every setting that differs between recipes once, for what has to run.
EFFECTS = (
    "deit_tiny", "deit_tiny_distilled", "deit_base_384", "deit3_small", "deit3_small_384", "transfer_cifar10",
    "transfer_inat18", "mmpretrain_deit_tiny",
)  # fmt: skip


def load(name: str) -> Recipe:
    return importlib.import_module(f"deitfast.recipes.{name}").RECIPE


def test_every_file_is_in_the_table() -> None:
    assert {p.stem for p in FILES} == {*TABLE, "deit_digits"}


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_states_the_facts_and_nothing_else(name: str) -> None:
    model, facts = TABLE[name]
    assert asdict(load(name)) == asdict(replace(Recipe(), model=model, **facts))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_papers_recipes_do_not_deviate_from_it(size: str) -> None:
    assert load(f"deit_{size}").deviations(1_281_167) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recipe_can_be_run_and_says_how(path: Path, monkeypatch, capsys) -> None:
    replace(load(path.stem), data="x").check()
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc
    assert doc in capsys.readouterr().out
    assert f" recipes/{path.name}" in doc
    if path.stem != "deit_digits":
        assert "Expected top-1" in doc
        assert "not yet measured" in doc
        assert "Not yet run" in doc


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recipe_names_its_run_folder_after_its_file(path: Path) -> None:
    assert f'name="{path.stem}"' in path.read_text()


@pytest.mark.parametrize("name", [name for name, (_, facts) in TABLE.items() if facts["init"]])
def test_a_later_stage_starts_from_the_same_architecture(name: str) -> None:
    recipe = load(name)
    before = load(Path(recipe.init).parts[1])
    ours, theirs = find_variant(recipe.model), find_variant(before.model)
    for what in ("width", "depth", "heads", "patch_size", "distilled", "layer_scale", "class_position"):
        assert getattr(ours, what) == getattr(theirs, what), what


@pytest.mark.parametrize("name", TABLE)
def test_the_image_is_a_whole_number_of_patches_and_the_batch_of_mix_groups(name: str) -> None:
    recipe = load(name)
    variant = find_variant(recipe.model)
    assert (recipe.image_size or variant.image_size) % variant.patch_size == 0
    assert recipe.batch % recipe.mix_group == 0


STEPS = 1251


@pytest.mark.parametrize("name", EFFECTS)
def test_the_learning_rate_is_the_originals_formula(name: str) -> None:
    recipe, facts = load(name), TABLE[name][1]
    lr, floor, total, warmup = facts["lr"], facts["min_lr"], facts["epochs"], facts["warmup_epochs"]
    for epoch in (0, 1, warmup / 2, warmup, total / 2, total - 1):
        step = round(epoch * STEPS)
        t = step / STEPS
        expected = 1e-6 + (lr - 1e-6) * t / warmup
        if t >= warmup:
            expected = floor + (lr - floor) * (1 + np.cos(np.pi * t / total)) / 2
        assert learning_rate(recipe, step, STEPS) == pytest.approx(expected, rel=1e-9)


def small_model(recipe: Recipe) -> torch.nn.Module:
    return create_model(
        recipe.model, num_classes=2, image_size=recipe.image_size or None, drop_path=recipe.drop_path,
        constant_drop_path=recipe.drop_path_schedule == "constant", layer_scale=recipe.layer_scale or None, fused=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in EFFECTS if "base" not in n and not n.startswith("transfer")])
def test_the_model_and_its_groups_are_as_stated(name: str) -> None:
    recipe, facts = load(name), TABLE[name][1]
    model = small_model(recipe)
    depth = len(model.blocks)
    constant = facts["drop_path_schedule"] == "constant"
    expected = [facts["drop_path"] if constant else facts["drop_path"] * i / (depth - 1) for i in range(depth)]
    assert model.drop_path_rates == pytest.approx(expected)
    assert ("blocks.0.ls1.gamma" in model.state_dict()) == (facts["layer_scale"] > 0)
    if facts["layer_scale"]:
        assert model.blocks[0].ls1.gamma.unique().item() == pytest.approx(facts["layer_scale"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, recipe.weight_decay)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (facts["weight_decay"], 0)
    tokens = {"cls_token", "pos_embed"} | ({"dist_token"} if model.distilled else set())
    assert {names[p] for p in spared["params"] if p.ndim > 1} == tokens
    assert all(p.ndim > 1 for p in decayed["params"])


@pytest.mark.parametrize("name", EFFECTS)
def test_mixing_erasing_flips_and_copies_happen_as_often_as_stated(name: str) -> None:
    recipe, facts = load(name), TABLE[name][1]
    n = 4000
    index, view = np.arange(n), np.zeros(n, np.int64)
    flipped = draws.flip(index, 0, view, 0, recipe.flip)
    assert flipped.mean() == pytest.approx(facts["flip"], abs=0.03)
    erased = draws.random_erasing(224, index, 0, view, 0, recipe.erase)
    assert (erased[:, 2] * erased[:, 3] > 0).mean() == pytest.approx(facts["erase"], abs=0.03)
    lam, box = draws.mix(224, n, 0, 0, recipe.mixup, recipe.cutmix, recipe.mix_probability, recipe.mix_switch)
    cut = box[:, 2] * box[:, 3] > 0
    assert (lam < 1).mean() > 0.97  # every group is mixed; a few boxes are empty or lambdas round to 1
    assert cut.mean() == pytest.approx(facts["mix_switch"], abs=0.04)
    assert lam[~cut & (lam < 1)].var() == pytest.approx(1 / (4 * (2 * facts["mixup"] + 1)), rel=0.1)  # Beta's
    order = Order.of(np.zeros(20_480, np.int64), recipe)
    images, copies, _ = order.slots(0)
    assert len(np.unique(images)) == pytest.approx(recipe.batch / facts["repeats"], rel=0.02)
    assert set(copies) == set(range(facts["repeats"]))
    policy = Augmentation(recipe, 224, torch.device("cpu"))
    ops = policy.draw(index, 0, view).ops
    applied = (ops > 0).sum(1)
    if facts["rand_augment"] == "three":
        assert (applied == 4).all()  # one of grayscale, solarize and blur; brightness, contrast and saturation
    else:
        assert applied.mean() == pytest.approx(1, abs=0.05)  # two, each with probability .5
        assert applied.max() == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "transfer_cifar10"])
def test_a_recipe_runs_end_to_end_on_two_processes(name: str, tmp_path: Path) -> None:
    file = ROOT / "recipes" / f"{name}.py"
    narrow = load(name).model.replace("base", "tiny")
    flags = ["--data", "digits", "--smoke", "--workers", "1", "--image-size", "32", "--model", narrow]
    assert "smoke test passed" in processes.run(file, flags, tmp_path / "said", size=2)


@pytest.mark.slow
def test_a_recipe_runs_under_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "recipes" / "deit3_small.py"), "--data", "digits", "--smoke", "--workers", "1", "--image-size", "32",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "smoke test passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run"], ["-m", "deitfast", "train"]], ids=str)
def test_a_recipe_of_ones_own_builds_on_a_shipped_one_wherever_it_lies(launcher: list[str], tmp_path: Path) -> None:
    example = ast.get_docstring(ast.parse((ROOT / "recipes" / "__init__.py").read_text()))
    assert example
    (tmp_path / "mine.py").write_text(textwrap.dedent(example.split("wherever it lies:")[1]))
    command = [sys.executable, *launcher, "mine.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "passes over the data [100]" in " ".join(done.stdout.split())
    assert "[deit_tiny_patch16_224]" in " ".join(done.stdout.split())


def test_fields_of_the_table_exist() -> None:
    names = {f.name for f in fields(Recipe)}
    for _, facts in TABLE.values():
        assert set(facts) <= names
