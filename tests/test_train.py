"""Training end to end on the packaged digits: world sizes, exact resume, evaluation, errors, the run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import deitfast
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from deitfast.training.train import train
from tests import processes

ROOT = Path(__file__).parent.parent
TINY = ROOT / "recipes" / "deit_tiny.py"
# Every mechanism that could break exactness is on: drop-path, mixup, cutmix, erasing, EMA, accumulation, repeats.
FULL = replace(
    Recipe(), model="deit_digits_patch4_16", data="digits", epochs=2, batch=32, micro_batch=16, warmup_epochs=1.0,
    drop_path=0.3, ema_decay=0.9, mix_group=8, workers=1, log_every=1, save_minutes=1e6, eval_every=9, image_size=8,
)  # fmt: skip
train_two_blocks = partial(train, depth=2)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = folder / "ckpt" / (folder / "ckpt" / "latest").read_text()
    return {f"{p.stem}.{k}": v for p in newest.glob("*.safetensors") for k, v in load_file(p).items()}


def assert_bitwise(one: Path, two: Path) -> None:
    a, b = final_state(one), final_state(two)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def flags(recipe: Recipe) -> list[str]:
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(recipe).items()
        if not isinstance(value, bool) and value != asdict(Recipe())[name]
    ]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """160 training and 20 validation images: an epoch is 10 steps of 16 images."""
    return write_noise(tmp_path_factory.mktemp("few"), train=80, val=10)


def write_noise(folder: Path, **images: int) -> str:
    """Write so many images of each of two classes, by split, and return the folder's name."""
    generator = np.random.default_rng(0)
    for split, count in images.items():
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return str(folder)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path, few: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = replace(FULL, data=few, batch=16, micro_batch=4, mix_group=4, epochs=1, warmup_epochs=0.0)
    assert train(replace(recipe, out=str(one))) is not None
    processes.run(TINY, flags(replace(recipe, out=str(two))), tmp_path / "said", size=2)
    first, second = losses(one), losses(two)
    assert len(first) == len(second) == 10
    assert second == pytest.approx(first, rel=1e-5)


def test_stopping_and_resuming_is_bitwise_exact(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_two_blocks(replace(FULL, out=str(whole)), stop_at=12)
    for stop in (1, 5, 6, 12):
        train_two_blocks(replace(FULL, out=str(parts)), stop_at=stop)
    assert_bitwise(whole, parts)
    assert losses(whole) == losses(parts)


@pytest.mark.slow
def test_killed_in_mid_epoch_and_started_again_ends_bitwise_equal(tmp_path: Path, few: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # A checkpoint after every step: a kill may hit a save, too.
    recipe = replace(FULL, data=few, batch=8, micro_batch=4, mix_group=4, epochs=1, save_minutes=0.0)
    train(replace(recipe, out=str(whole)))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", TINY, *flags(replace(recipe, out=str(killed)))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (killed / "metrics.jsonl").exists() or len(losses(killed)) < 7:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # the launcher alone: its worker must not live on
    process.wait()
    assert len(losses(killed)) < 20
    train(replace(recipe, out=str(killed)))
    assert_bitwise(whole, killed)
    assert losses(whole) == losses(killed)


def test_micro_batch_and_accumulation_do_not_change_the_result(tmp_path: Path) -> None:
    results = []
    for micro_batch in (8, 32):
        folder = tmp_path / str(micro_batch)
        train_two_blocks(replace(FULL, micro_batch=micro_batch, out=str(folder)), stop_at=4)
        results.append(losses(folder))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1), ("drop_path", 0.0), ("mixup", 0.1), ("cutmix", 0.0), ("mix_probability", 0.5), ("mix_switch", 0.1),
        ("mix_group", 32), ("smoothing", 0.0), ("repeats", 1), ("crop_min", 0.5), ("flip", 0.0), ("erase", 0.0),
        ("lr", 1e-2), ("warmup_lr", 1e-3), ("warmup_epochs", 0.5), ("weight_decay", 0.5), ("beta1", 0.5),
        ("beta2", 0.5), ("adam_eps", 1e-2), ("clip_norm", 0.01), ("layer_scale", 0.1), ("crop_max", 0.5),
        ("image_size", 32), ("precision", "bf16"), ("batch", 64), ("epochs", 1), ("min_lr", 1e-4),
    ],
)  # fmt: skip
def test_every_setting_has_an_effect(tmp_path: Path, reference_losses: list[float], field: str, value: object) -> None:
    recipe = replace(FULL, out=str(tmp_path), lr=1e-3, warmup_lr=1e-4, warmup_epochs=0.05)
    changed = replace(recipe, **{field: value})
    train_two_blocks(changed, stop_at=4)
    assert losses(tmp_path) != reference_losses


@pytest.fixture(scope="module")
def reference_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("reference")
    train_two_blocks(replace(FULL, out=str(folder), lr=1e-3, warmup_lr=1e-4, warmup_epochs=0.05), stop_at=4)
    return losses(folder)


def test_a_run_leaves_everything_a_reader_needs(tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    recipe = replace(FULL, data=few, out=str(folder), epochs=1, lr=1e-3)
    result = train_two_blocks(recipe, eval_images=15)
    assert result is not None
    assert result.raw.images == 15
    assert result.step == 5
    assert json.loads((folder / "recipe.json").read_text()) == asdict(recipe)
    assert json.loads((folder / "env.json").read_text())["torch"] == torch.__version__
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert {"step", "epoch", "loss", "lr", "images_per_second", "data_wait"} <= lines[0].keys()
    assert {"top1", "ema_top1", "images"} <= lines[-1].keys()
    best = load_file(folder / "best" / "model.safetensors")
    assert best.keys() == {k.removeprefix("model.") for k in final_state(folder) if k.startswith("model.")}
    said = capsys.readouterr().out
    assert "deviation: batch is 32, the paper's is 1024" in said
    assert "done: top-1" in said
    assert said.splitlines()[0] in (folder / "log.txt").read_text()
    again = train_two_blocks(recipe, eval_images=15)  # finished: evaluates, trains nothing
    assert again is not None
    assert again.raw == result.raw
    assert again.ema == result.ema


def test_a_damaged_checkpoint_falls_back_and_training_ends_the_same(tmp_path: Path, capsys) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    train_two_blocks(replace(FULL, out=str(whole)), stop_at=6)
    for stop in (2, 4):
        train_two_blocks(replace(FULL, out=str(hurt)), stop_at=stop)
    victim = hurt / "ckpt" / "step-0000004" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x55")
    capsys.readouterr()
    train_two_blocks(replace(FULL, out=str(hurt)), stop_at=6)
    assert (
        "step-0000004/model.safetensors sha256 mismatch. Using step-0000002 (2 steps lost)" in capsys.readouterr().out
    )
    assert_bitwise(whole, hurt)
    assert losses(whole) == losses(hurt)


def test_a_run_keeps_its_list_of_images_when_some_vanish(tmp_path: Path, capsys) -> None:
    data = tmp_path / "data"
    write_noise(data, train=40, val=4)
    recipe = replace(FULL, data=str(data), out=str(tmp_path / "run"), batch=16, micro_batch=8, bad_limit=0.05, epochs=3)
    train_two_blocks(recipe, stop_at=4)
    for i in range(2):
        (data / "train" / "cat" / f"{i}.png").unlink()
    result = train_two_blocks(recipe, eval_images=8)
    assert result is not None
    assert result.step == 15  # 80 images make 5 steps an epoch, 78 would make 4
    said = capsys.readouterr().out
    assert "changed since the run began: 2 of its 80 images are gone or changed and 0 are new" in said
    for i in range(2, 6):
        (data / "train" / "cat" / f"{i}.png").unlink()
    with pytest.raises(DeitfastError, match=r"is not the data that .* was trained with: 6 of its 80 images are gone"):
        train_two_blocks(recipe)


def test_another_recipe_in_the_folder_is_refused_unless_allowed(tmp_path: Path) -> None:
    recipe = replace(FULL, out=str(tmp_path / "run"))
    train_two_blocks(recipe, stop_at=1)
    with pytest.raises(DeitfastError, match=r"another recipe: --lr is 0.1, was 0.001. Change --out, or give --allow"):
        train_two_blocks(replace(recipe, lr=0.1), stop_at=2)
    train_two_blocks(replace(recipe, lr=0.1, allow_changes=True, workers=2), stop_at=2)


def test_a_run_does_not_slip_to_the_cpu_where_its_gpus_are_gone(tmp_path: Path) -> None:
    recipe = replace(FULL, out=str(tmp_path / "run"))
    train_two_blocks(recipe, stop_at=1)
    facts = json.loads((tmp_path / "run" / "env.json").read_bytes())
    facts["choices"]["device"] = "cuda"
    (tmp_path / "run" / "env.json").write_text(json.dumps(facts))
    with pytest.raises(DeitfastError, match=r"has run on cuda so far and would go on on cpu here. .* --device cpu$"):
        train_two_blocks(recipe, stop_at=2)
    train_two_blocks(replace(recipe, device="cpu"), stop_at=2)


@pytest.mark.parametrize(
    ("engine", "message"),
    [("flat", "ten steps in a row had gradients that are not finite"), ("plain", "loss is nan at")],
)
def test_a_run_that_explodes_stops(tmp_path: Path, engine: str, message: str) -> None:
    recipe = replace(FULL, out=str(tmp_path / "run"), lr=1e30, warmup_epochs=0.0, engine=engine)
    with pytest.raises(DeitfastError, match=message):
        train_two_blocks(recipe)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes_bitwise(tmp_path: Path, few: str) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    recipe = replace(FULL, data=few, batch=8, micro_batch=4, mix_group=4, epochs=2)
    train(replace(recipe, out=str(whole)))
    said = tmp_path / "said"
    with processes.running(TINY, flags(replace(recipe, out=str(stopped))), said) as (process,):
        deadline = time.monotonic() + 120
        while not (stopped / "metrics.jsonl").exists() or len(losses(stopped)) < 5:
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.02)
        process.terminate()
        process.join(60)
        assert process.exitcode == 75
    assert "SIGTERM: saved at step" in said.read_text()
    assert 5 <= len(losses(stopped)) < 40
    train(replace(recipe, out=str(stopped)))
    assert_bitwise(whole, stopped)
    assert losses(whole) == losses(stopped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "data folder nowhere not found"),
        ({"data": "EMPTY_CLASS"}, "class folder .*cat has no images"),
        (
            {"model": "deit_tinny_patch16_224"},
            "model 'deit_tinny_patch16_224' unknown. Did you mean deit_tiny_patch16_224?",
        ),
        ({"model": "deit_tinny_patch16_224", "batch": 4096}, "unknown. Did you mean deit_tiny_patch16_224?"),
        ({"init": "WRONG_WEIGHTS"}, "another model, not of deit_digits_patch4_16"),
        ({"init": "missing.safetensors"}, "no weight file missing.safetensors"),
        ({"batch": 31}, "--batch is 31, odd, but mixup and cutmix mix pairs"),
        ({"micro_batch": 12}, "--micro-batch 12 does not divide the 32 images .* Valid: 2, 4, 8, 16, 32"),
        ({"batch": 4096}, "1437 training images do not fill one batch of 4096"),
        ({"device": "cuda"}, "no GPU"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, change: dict, message: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from safetensors.torch import save_file

    for name in ("dog", "cat"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / "dog" / "1.jpg")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    places = {"EMPTY_CLASS": str(tmp_path / "data"), "WRONG_WEIGHTS": str(tmp_path / "other.safetensors")}
    change = {key: places.get(value, value) for key, value in change.items()}
    out = tmp_path / "run"
    with pytest.raises(DeitfastError, match=message) as raised:
        train(replace(FULL, out=str(out), **change), stop_at=1)
    assert "\n" not in str(raised.value)
    assert not out.exists()


def run(*command: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_smoke_passes_and_leaves_nothing(tmp_path: Path) -> None:
    said = processes.run(TINY, ["--data", "digits", "--smoke", "--out", str(tmp_path / "run")], tmp_path / "said")
    assert "smoke test passed: deit_tiny_patch16_224 cut to 2 blocks on digits, 1 cpu process(es)" in said
    assert "3 steps ran with a finite loss: flat buffers" in said
    assert "saved after step 2 and resumed" in said
    assert "4 images were evaluated" in said
    for frightening in ("loss ", "top-1", "eta", "deviation"):
        assert frightening not in said
    assert not (tmp_path / "run").exists()


def test_train_from_python_writes_to_the_models_run_folder_and_goes_on_from_it(
    tmp_path: Path, few: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = replace(FULL, data=few, epochs=1, warmup_epochs=0.0)
    result = deitfast.train(recipe)
    assert result.folder == Path("runs/deit_digits_patch4_16")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [recipe.model]
    assert (result.folder / "best" / "model.safetensors").is_file()
    assert result.step == 5
    assert result.raw.images == 20
    again = deitfast.train(recipe)
    assert "resuming runs/deit_digits_patch4_16 at step 5" in capsys.readouterr().out
    assert (again.step, again.raw, again.ema) == (result.step, result.raw, result.ema)
    assert len(losses(result.folder)) == 5
    with pytest.raises(DeitfastError, match="no data"):
        deitfast.train(replace(recipe, data=""))


def test_a_recipe_without_data_names_both_ways_in_one_line(tmp_path: Path) -> None:
    result = run("recipes/deit_base.py", "--out", str(tmp_path / "run"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "--data FOLDER" in result.stderr
    assert "--data digits" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_folder_is_refused_while_the_first_holds_it(tmp_path: Path, monkeypatch) -> None:
    from deitfast.training import run_folder as report

    monkeypatch.setattr(report, "_LOCK_PATIENCE_S", 0.1)
    first = report.RunFolder(tmp_path)
    with pytest.raises(DeitfastError, match=rf"locked by pid {os.getpid()} on .*\. Stop it, or change --out"):
        report.RunFolder(tmp_path)
    first.close()
    report.RunFolder(tmp_path).close()


def test_a_longer_run_says_how_the_learning_rate_jumps(
    tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    recipe = replace(FULL, data=few, out=out, batch=16, epochs=1, warmup_epochs=0.0, ema_decay=0.0)
    train_two_blocks(recipe, eval_images=10)
    capsys.readouterr()
    longer = replace(recipe, epochs=2, allow_changes=True)
    train_two_blocks(longer, stop_at=11)
    told = next(line for line in capsys.readouterr().out.splitlines() if "learning rate rises" in line)
    rates = [
        json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "lr" in line
    ]
    assert rates[9] < rates[10]
    assert f"the learning rate rises from {rates[9]:.2g} to {rates[10]:.2g} at step 11" in told
    assert "since --epochs changed. A new run with --init" in told
    train_two_blocks(longer, stop_at=12)
    assert "learning rate rises" not in capsys.readouterr().out  # told once: from here on it is this schedule
    with pytest.raises(DeitfastError, match=r"is at step 12, past the 10 of --epochs 1\. Give more epochs"):
        train_two_blocks(replace(recipe, allow_changes=True))
    train_two_blocks(longer, eval_images=10)
    capsys.readouterr()
    train_two_blocks(replace(longer, lr=5e-4), eval_images=10)
    out = capsys.readouterr().out
    assert "nothing is left to train: step 20 of 20 is done" in out
    assert "learning rate rises" not in out
    assert "learning rate falls" not in out


@pytest.mark.parametrize("kind", ["balanced", "sampled"])
def test_rare_classes_weigh_the_same_in_both_engines(tmp_path: Path, kind: str) -> None:
    found = []
    for engine in ("flat", "plain"):
        out = tmp_path / engine
        train_two_blocks(replace(FULL, class_weights=kind, engine=engine, ema_decay=0.0, out=str(out)), stop_at=3)
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    train_two_blocks(replace(FULL, ema_decay=0.0, out=str(tmp_path / "none")), stop_at=3)
    assert losses(tmp_path / "none") != pytest.approx(found[0], rel=1e-5)
