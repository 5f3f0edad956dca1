"""The table of models: published sizes and multiply-adds, names of other libraries, and a start without torch."""

from __future__ import annotations

import json

import pytest
import torch

from deitfast.cli.main import main
from deitfast.errors import DeitfastError
from deitfast.model.factory import create_model
from deitfast.model.zoo import OTHER_WEIGHTS, VARIANTS, canonical_name, find_variant, list_models, recognise

# Parameters in millions and multiply-adds in billions of mmpretrain's table (configs/deit/README.md), copied here so
# that the zoo is compared with them and not with itself.
PUBLISHED = {
    "deit_tiny_patch16_224": (5.72, 1.26),
    "deit_tiny_distilled_patch16_224": (5.91, 1.27),
    "deit_small_patch16_224": (22.05, 4.61),
    "deit_small_distilled_patch16_224": (22.44, 4.63),
    "deit_base_patch16_224": (86.57, 17.58),
    "deit_base_distilled_patch16_224": (87.34, 17.67),
    "deit_base_patch16_384": (86.86, 55.54),
    "deit_base_distilled_patch16_384": (87.63, 55.65),
}
# To the last digit in configs/deit3/metafile.yml.
PUBLISHED_EXACTLY = {
    "deit3_small_patch16_224": (22_059_496, 4_607_954_304),
    "deit3_small_patch16_384": (22_205_416, 15_517_663_104),
    "deit3_medium_patch16_224": (38_849_512, 8_003_064_320),
    "deit3_base_patch16_224": (86_585_320, 17_581_972_224),
    "deit3_base_patch16_384": (86_877_160, 55_538_974_464),
    "deit3_large_patch16_224": (304_374_760, 61_603_111_936),
    "deit3_large_patch16_384": (304_763_880, 191_210_034_176),
    "deit3_huge_patch14_224": (632_126_440, 167_400_741_120),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name: str) -> None:
    variant = VARIANTS[name]
    assert (round(variant.parameters() / 1e6, 2), round(variant.multiply_adds() / 1e9, 2)) == PUBLISHED[name]
    assert (variant.params_millions, variant.macs_billions) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_EXACTLY)
def test_deit3_is_the_published_one_to_the_last_digit(name: str) -> None:
    variant = VARIANTS[name]
    assert (variant.parameters(), variant.multiply_adds()) == PUBLISHED_EXACTLY[name]
    assert variant.params_millions == round(variant.parameters() / 1e6, 2)


@pytest.mark.parametrize("name", list_models())
def test_the_model_has_as_many_parameters_as_the_table_says(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[name].parameters()
    assert recognise({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}) == name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("deit-tiny_4xb256_in1k", "deit_tiny_patch16_224"),
        ("deit-tiny_pt-4xb256_in1k", "deit_tiny_patch16_224"),
        ("deit-small-distilled_3rdparty_in1k", "deit_small_distilled_patch16_224"),
        ("deit-base_3rdparty_in1k", "deit_base_patch16_224"),
        ("deit-base_224px-pre_3rdparty_in1k-384px", "deit_base_patch16_384"),
        ("deit-base-distilled_224px-pre_3rdparty_in1k-384px", "deit_base_distilled_patch16_384"),
        ("deit3-small-p16_3rdparty_in1k", "deit3_small_patch16_224"),
        ("deit3-huge-p14_3rdparty_in1k", "deit3_huge_patch14_224"),
        ("deit3-large-p16_3rdparty_in1k-384px", "deit3_large_patch16_384"),
        ("facebook/deit-tiny-patch16-224", "deit_tiny_patch16_224"),
        ("facebook/deit-base-distilled-patch16-384", "deit_base_distilled_patch16_384"),
        ("timm/deit_small_patch16_224.fb_in1k", "deit_small_patch16_224"),
    ],
)
def test_names_of_other_libraries(theirs: str, ours: str) -> None:
    assert canonical_name(theirs) == ours
    found = find_variant(theirs)
    assert (found.width, found.depth, found.image_size) == (
        VARIANTS[ours].width, VARIANTS[ours].depth, VARIANTS[ours].image_size
    )  # fmt: skip


def test_mmpretrains_own_weights_keep_their_accuracy() -> None:
    assert find_variant("deit-tiny_4xb256_in1k").top1 == 74.50
    assert find_variant("deit-base_3rdparty_in1k").top1 == VARIANTS["deit_base_patch16_224"].top1
    for name, variant in OTHER_WEIGHTS.items():
        assert variant.url != VARIANTS[canonical_name(name)].url
    # Weights fine-tuned from ImageNet-21k are others: their name must not stand for these.
    with pytest.raises(DeitfastError, match="unknown"):
        find_variant("deit3-small-p16_in21k-pre_3rdparty_in1k")


def test_published_numbers_come_with_their_source() -> None:
    for name, variant in {**VARIANTS, **OTHER_WEIGHTS}.items():
        told = [variant.top1, variant.top5, variant.source, variant.url]
        assert all(told) or not any(told), name
        assert variant.measured_top1 is None, "a number that was measured says where: change this test with it"


def test_the_table_lists_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in list_models())
    assert max(map(len, lines)) <= 120
    main(["models", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert listed["deit_base_distilled_patch16_384"]["top1"] == 85.2
    assert listed["deit_tiny_patch16_224"]["multiply_adds"] == VARIANTS["deit_tiny_patch16_224"].multiply_adds()
    assert listed["deit_small_patch16_224"]["url"].endswith("-cd65a155.pth")
