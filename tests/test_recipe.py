"""Recipe: flags from fields, errors with the nearest name, deviations in words, the paper's values in the files."""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from pathlib import Path

import pytest

from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe, parse_flags

RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(name: str) -> Recipe:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RECIPE


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_papers_recipes_deviate_only_where_they_say(size: str) -> None:
    recipe = load_recipe(f"deit_{size}")
    assert recipe.model == f"deit_{size}_patch16_224"
    assert recipe.deviations(1_281_167) == ["rand augment is none, the paper's is rand-m9-mstd0.5-inc1"]
    # The authors' main.py and table 9 of the paper, stated here a second time on purpose.
    facts = {
        "epochs": 300, "batch": 1024, "lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_epochs": 5,
        "weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "clip_norm": 0, "smoothing": 0.1,
        "mixup": 0.8, "cutmix": 1.0, "mix_probability": 1, "mix_switch": 0.5, "repeats": 3, "crop_min": 0.08,
        "crop_max": 1, "flip": 0.5, "erase": 0.25, "drop_path": 0.1, "ema_decay": 0.99996, "eval_crop_ratio": 0.875,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in facts} == facts


def test_every_field_is_a_flag_and_at_most_sixty() -> None:
    assert len(fields(Recipe)) <= 60
    for f in fields(Recipe):
        value = getattr(Recipe(), f.name)
        flag = "--" + f.name.replace("_", "-")
        if isinstance(value, bool):
            assert getattr(parse_flags(Recipe(), [flag]), f.name) is True
            continue
        new = {str: "text", int: 7, float: 0.125}[type(value)]
        assert getattr(parse_flags(Recipe(), [flag, str(new)]), f.name) == new
        assert f.metadata["help"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "3"], "unknown flag --epoch. Did you mean --epochs?"),
        (["--mixupp=0.1"], "unknown flag --mixupp. Did you mean --mixup?"),
        (["digits"], "unknown argument digits."),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--batch", "7"], "--batch is 7, odd, but mixup and cutmix mix pairs"),
        (["--micro-batch", "3"], "--micro-batch is 3, odd, but mixup and cutmix mix pairs"),
        (["--lr=-1"], "--lr is -1.0, must be in"),
        (["--crop-min", "0.9", "--crop-max", "0.5"], "--crop-max is 0.5, must be in"),
        (["--precision", "fp16"], "--precision is 'fp16', must be one of auto, bf16, fp32"),
        (["--rand-augment", "rand-m9"], "--rand-augment is 'rand-m9', must be one of none"),
        (["--warmup-epochs", "400"], "--warmup-epochs 400 exceeds --epochs 300"),
        (["--reset-head"], "--reset-head needs --init"),
        (["--data", ""], "no data. Give --data FOLDER .* or --data digits"),
    ],
)
def test_wrong_flags_are_named_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(DeitfastError, match=message) as raised:
        parse_flags(replace(Recipe(), data="x"), flags).check()
    assert "\n" not in str(raised.value)


def test_deviations_and_changes_are_words() -> None:
    recipe = replace(Recipe(), rand_augment="rand-m9-mstd0.5-inc1", batch=512, init="w.pth", workers=3)
    assert recipe.deviations(100) == [
        "batch is 512, the paper's is 1024",
        "the data has 100 training images, the paper's 1,281,167",
        "starts from w.pth, the paper from fresh weights",
    ]
    assert Recipe().changes({"batch": 512, "workers": 3}) == ["--batch is 1024, was 512"]
