"""Recipe: flags from fields, errors with the nearest name, deviations in words. The files: see test_recipes.py."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from deitfast.training.launch import parse_flags


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
        (["--rand-augment", "rand-9"], "--rand-augment is 'rand-9', must be none, three"),
        (["--warmup-epochs", "400"], "--warmup-epochs 400 exceeds --epochs 300"),
        (["--reset-head"], "--reset-head needs --init"),
        (["--teacher", "x"], "--teacher needs --distillation hard: the one does nothing without the other"),
        (["--distillation", "soft"], "--distillation needs --teacher: the one does nothing without the other"),
        (["--loss", "bce"], "--smoothing is 0.1, but --loss bce makes every class with a share a full target"),
        (["--optimizer", "lamb", "--engine", "plain"], "--engine plain has no LAMB: PyTorch ships none"),
        (["--class-weights", "rare"], "--class-weights is 'rare', must be one of none, balanced, sampled"),
        (
            ["--loss", "bce", "--smoothing", "0", "--class-weights", "balanced"],
            "Give --loss ce, or --class-weights sam",
        ),
        (["--scale-lr", "--lr", "1e-4"], "--lr is final, --scale-lr computes it from the recipe's. Give one of them"),
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
        "by the rule the learning rate of batch 512 is 0.0005, not 0.001. --scale-lr follows it",
        "the data has 100 training images, the paper's 1,281,167",
        "starts from w.pth, the paper from fresh weights",
    ]
    transfer = replace(Recipe(), lr=1e-2, init="b.pth", batch=768)
    assert transfer.scaled(512).deviations(50_000, transfer) == ["batch is 512, the recipe's is 768"]
    assert replace(transfer, init="c.pth").deviations(50_000, transfer) == ["starts from c.pth, the recipe from b.pth"]
    assert Recipe().scaled(512).deviations(1_281_167, Recipe()) == ["batch is 512, the paper's is 1024"]
    assert Recipe().changes({"batch": 512, "workers": 3}) == ["--batch is 1024, was 512"]


@pytest.mark.parametrize(
    ("optimizer", "batch", "lr"),
    # The DeiT paper's and Goyal et al.'s rule; for LAMB You et al.'s square root.
    [("adamw", 64, 5e-4 * 64 / 512), ("sgd", 2048, 2e-3), ("lamb", 256, 5e-4), ("lamb", 4096, 2e-3)],
)
def test_the_learning_rate_that_belongs_to_the_batch(optimizer: str, batch: int, lr: float) -> None:
    base = replace(Recipe(), data="x", optimizer=optimizer)
    chosen = parse_flags(base, ["--batch", str(batch), "--scale-lr"])
    assert chosen.lr == pytest.approx(lr)
    assert chosen == base.scaled(batch)
    assert not [line for line in chosen.deviations(stated=base) if "lr" in line or "learning rate" in line]
    (told,) = [line for line in replace(base, batch=batch).deviations(stated=base) if "learning rate" in line]
    assert f"batch {batch} is {lr:.4g}, not 0.001" in told
    assert replace(base, lr=1.01e-3).deviations(stated=base) == ["lr is 0.00101, the paper's is 0.001"]


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--data-path", "Here it is --data"),
        ("--data_dir=x", "Here it is --data"),
        ("--finetune", "Here it is --init"),
        ("--initial-checkpoint", "Here it is --init"),
        ("--output_dir", "Here it is --out"),
        ("--work-dir", "Here it is --out"),
        ("--batch-size=64", "Here it is --batch"),
        ("-b", "Here it is --batch"),
        ("-j", "Here it is --workers"),
        ("--input-size", "Here it is --image-size"),
        ("--img-size", "Here it is --image-size"),
        ("--aa", "Here it is --rand-augment"),
        ("--ThreeAugment", "Here it is --rand-augment three"),
        ("--reprob", "Here it is --erase"),
        ("--opt", "Here it is --optimizer"),
        ("--clip-grad", "Here it is --clip-norm"),
        ("--model-ema-decay", "Here it is --ema-decay"),
        ("--grad-accum-steps", "Here it is --micro-batch"),
        ("--amp", "Here it is --precision"),
        ("--auto-scale-lr", "Here it is --scale-lr"),
        ("--rand_augment", "Here it is --rand-augment"),
        ("--balanced-sampler", "Here it is --class-weights"),
        ("--resume", "No flag is needed: the same command resumes"),
        ("--nb-classes", "No flag is needed: the number of classes comes from the data"),
        ("--num-classes=4", "No flag is needed: the number of classes comes from the data"),
        ("--eval", "The command for it is `deitfast test"),
        ("--unscale-lr", "No flag is needed: --lr is final"),
        ("--local_rank", "No flag is needed: `deitfast train` and torchrun start"),
    ],
)
def test_flags_of_other_trainers_get_their_name_here(typed: str, hint: str) -> None:
    with pytest.raises(DeitfastError) as raised:
        parse_flags(Recipe(), [typed])
    assert f". {hint}" in str(raised.value)


def test_every_flag_that_a_hint_names_is_one() -> None:
    from deitfast.elsewhere import _RENAMED, _TOLD
    from deitfast.training.launch import _flags_of

    recipes = set(_flags_of(Recipe())._option_string_actions)
    of_use = {"--weights", "--ema", "--top", "--classes", "--json", "--format", "--processes", "--nproc-per-node"}
    assert {name for names in _RENAMED.values() for name in names.split()} <= recipes | of_use
    assert set(re.findall(r"--[a-z-]+", " ".join(_TOLD.values()))) <= recipes | of_use | {"--help"}
    assert not [word for word in (*_RENAMED, *_TOLD) if f"--{word}" in recipes - {"--init"}]
