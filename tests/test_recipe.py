"""Recipe: flags from fields, errors with the nearest name, deviations in words. The files: see test_recipes.py."""

from __future__ import annotations

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
    transfer = replace(Recipe(), lr=1e-2, init="b.pth", batch=768)
    assert replace(transfer, batch=512).deviations(50_000, transfer) == ["batch is 512, the recipe's is 768"]
    assert replace(transfer, init="c.pth").deviations(50_000, transfer) == ["starts from c.pth, the recipe from b.pth"]
    assert replace(Recipe(), batch=512).deviations(1_281_167, Recipe()) == ["batch is 512, the paper's is 1024"]
    assert Recipe().changes({"batch": 512, "workers": 3}) == ["--batch is 1024, was 512"]
