"""Every file of examples/ does what it says, at sizes of a second."""

from __future__ import annotations

import runpy
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.model.factory import create_model
from deitfast.model.weights import save_weights

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tested() -> None:
    tested = {"accelerate_timm", "own_recipe", "own_data", "lora"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_a_timm_model_learns_with_fused_blocks(timm) -> None:
    losses = example("accelerate_timm")["main"](steps=10, img_size=32, embed_dim=64, depth=2, num_heads=2)
    assert losses[-1] < losses[0] / 2


def test_a_recipe_of_ones_own_is_found_and_differs_where_it_says() -> None:
    from deitfast.cli.recipes import load_recipe

    mine, shipped = load_recipe(str(EXAMPLES / "own_recipe.py")), load_recipe("deit_digits")
    assert mine != shipped
    assert (mine.model, mine.epochs, mine.mixup) == (shipped.model, 20, 0.0)


def test_photos_train_a_model_that_names_what_it_sees(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for split in ("train", "val"):
        with tarfile.open(ROOT / "deitfast" / "data" / "digits" / f"{split}.tar") as archive:
            wanted = [
                m for m in archive.getmembers() if m.isfile() and Path(m.name).parts[-2] in ("0", "1", "zero", "one")
            ]
            for member in wanted[:40]:
                folder = photos / split / Path(member.name).parts[-2]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_weights(weights, create_model("deit_digits_patch4_16", fused=False).state_dict(), {})
    settings = {"model": "deit_digits_patch4_16", "epochs": 2, "batch": 16, "lr": 1e-3, "workers": 1}
    seen = example("own_data")["main"](str(photos), str(weights), str(tmp_path / "run"), **settings)
    assert seen in {path.name for path in (photos / "train").iterdir()}


def test_adapters_learn_beside_fused_blocks() -> None:
    pytest.importorskip("peft")
    from transformers import ViTConfig

    tiny = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=32, num_labels=10
    )
    losses = example("lora")["main"](tiny, adapted=1, steps=8)
    assert losses[-1] < losses[0] / 2
