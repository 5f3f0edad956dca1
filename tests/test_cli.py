"""The deitfast command: quick, clear about mistakes, and right about accuracy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from deitfast import guard
from deitfast.cli import train as training
from deitfast.cli.main import main
from deitfast.cli.recipes import load_recipe
from deitfast.training.launch import parse_flags

ROOT = Path(__file__).parent.parent


def errors_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "models" in errors_of(capsys, "model")
    assert "Did you mean --json?" in errors_of(capsys, "models", "--jsn")
    assert "--model" in errors_of(capsys, "test", "--data", "digits")
    assert "Did you mean --weights?" in errors_of(
        capsys, "test", "--model", "deit_tiny_patch16_224", "--data", "digits", "--weight", "x"
    )
    assert "data folder nowhere not found" in errors_of(
        capsys, "test", "--model", "deit_tiny_patch16_224", "--data", "nowhere", "--weights", "x"
    )


def test_an_unknown_recipe_is_told_with_the_nearest_name_and_all_names(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong, meant in (("deit_tny", "deit_tiny"), ("recipes/deit_base.py", "deit_base"), ("x", "")):
        told = errors_of(capsys, "train", wrong, "--data", "digits")
        assert f"no recipe {wrong}: neither a Python file nor the name of a shipped recipe." in told
        assert ("Did you mean" in told) == bool(meant)
        assert f"Did you mean {meant}? Shipped: " in told or not meant
        assert "deit3_base, deit3_base_224, " in told
    (tmp_path / "mine.py").touch()
    assert "Did you mean mine.py?" in errors_of(capsys, "train", "mien.py")
    assert "no recipe digits" in errors_of(capsys, "data", "show", "--recipe", "digits", "--data", "digits")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", "images of an update, over all processes: part of the result"),
        ("predict", "images at once, changes speed alone"),
        ("test", "images at once a process, changes speed alone"),
        ("doctor", "images at once to verify"),
    ],
)
def test_what_batch_means_is_told_where_it_is_asked(command: str, told: str, capsys) -> None:
    """Images of an update in a recipe, images at once in every other command."""
    ask = partial(main, [command, "--help"])
    if command == "train":
        ask = partial(parse_flags, load_recipe("deit_tiny"), ["--help"])
    with pytest.raises(SystemExit) as ended:
        ask()
    assert not ended.value.code
    lines = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"--batch (BATCH )?{told}", lines)


def test_a_recipe_that_comes_after_its_flags_is_told_what_comes_first(capsys) -> None:
    for words in (["--data", "digits", "deit_tiny"], ["--lr", "1e-3", "deit_tiny", "--data", "digits"]):
        assert "the recipe comes first: deitfast train deit_tiny --data DIR" in errors_of(capsys, "train", *words)
    assert "the recipe comes first: deitfast train RECIPE --data DIR" in errors_of(capsys, "train", "--smoke")


def test_train_alone_lists_the_shipped_recipes(capsys) -> None:
    for help_flag in ([], ["--help"]):
        main(["train", *help_flag])
        listed = capsys.readouterr().out.split("shipped recipes:")[1].split()
        assert listed == sorted(p.stem for p in (ROOT / "recipes").glob("[!_]*.py"))


def test_models_lists_the_papers_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert listed["deit_base_distilled_patch16_384"]["top1"] == 85.2
    for name, variant in listed.items():
        if variant["params_millions"]:
            from deitfast import create_model

            with torch.device("meta"):
                count = sum(p.numel() for p in create_model(name).parameters())
            assert round(count / 1e6, 2) == pytest.approx(variant["params_millions"], abs=0.011), name


@pytest.mark.parametrize("arguments", ["--help", "models", "train deit_base --help"])
def test_help_and_models_answer_without_what_is_slow_to_import(arguments: str) -> None:
    code = f"""
import contextlib, sys
from deitfast.cli.main import main
from deitfast.cli.recipes import load_recipe
from deitfast.training.launch import parse_flags
with contextlib.suppress(SystemExit):
    main({arguments.split()!r})
sys.exit(", ".join({{"torch", "triton", "numpy", "nvidia.dali", "PIL"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "usage: deitfast" in done.stdout or "deit_base_patch16_224" in done.stdout


@pytest.mark.slow
def test_accuracy_and_predictions_agree_with_timms_pipeline(shared_data, timm, tmp_path, capsys) -> None:
    from PIL import Image
    from timm.data import create_transform

    from deitfast.data import EvalLoader, normalise, open_dataset

    weights = shared_data / "weights" / "deit_tiny_patch16_224.safetensors"
    for synset in sorted((shared_data / "imagenet-sample").iterdir())[::3]:
        (tmp_path / synset.name).symlink_to(synset)
    main([
        "test", "--model", "deit_tiny_patch16_224", "--weights", str(weights), "--data", str(tmp_path),
        "--classes", "imagenet", "--json",
    ])  # fmt: skip
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 100

    theirs = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(weights)).eval()
    # DeiT's evaluation transform: resize the short side to 256, bicubic, and cut out the centre.
    transform = create_transform(224, crop_pct=0.875, interpolation="bicubic")
    data = open_dataset(str(tmp_path), split="val", classes="imagenet").val
    assert data is not None
    agree = correct = seen = 0
    with torch.no_grad():
        for images, labels in EvalLoader(data, image_size=224, batch=50):
            paths = [f"{data.root}/{data.name(seen + i)}" for i in range(len(labels))]
            batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
            expected, ours = theirs(batch).argmax(1), theirs(normalise(images)).argmax(1)
            agree += (expected == ours).sum().item()
            correct += (ours == labels).sum().item()
            seen += len(labels)
    assert agree >= 99
    assert scores["top1"] == correct


@pytest.mark.parametrize("trains", [False, True])
def test_a_file_that_does_not_train_is_told(trains, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "recipe.py"
    file.write_text("recipe = 1")

    def torchrun(arguments: list[str]) -> None:
        assert str(file) in arguments
        if trains:
            guard.trains()

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    monkeypatch.setattr(training.logging, "disable", lambda level: None)
    for name in ("DEITFAST_EXIT_FILE", "PET_SIGNALS_TO_HANDLE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")
    if trains:
        main(["train", str(file), "--processes", "1"])
        return
    with pytest.raises(SystemExit) as end:
        main(["train", str(file), "--processes", "1"])
    assert end.value.code == 2
    assert f"error: {file} ended without training. A recipe ends with run(" in capsys.readouterr().err


@pytest.mark.slow
def test_the_launcher_adds_nothing_to_a_workers_one_line(tmp_path) -> None:
    command = [sys.executable, "-m", "deitfast", "train", "deit_tiny", "--processes", "2"]
    result = subprocess.run(
        [*command, "--data", "nowhere", "--out", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: data folder nowhere not found.")
    assert result.stderr.count("\n") == 1
