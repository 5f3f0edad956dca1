"""One run of the table: trained by the engine in its own folder, resumed where it stopped, and written down as JSON."""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import deitfast
from benchmarks import timm_loop
from benchmarks.measuring.record import facts
from benchmarks.paper import teacher as convnets
from benchmarks.paper.rows import BASE, CONVNET, EQUAL_CONVNET, TRANSFORMER, Run
from deitfast.cli.recipes import load_recipe
from deitfast.data import Manifest, open_dataset
from deitfast.data.files import add_member
from deitfast.files import write_atomically
from deitfast.model.zoo import find_variant
from deitfast.recipe import Recipe, flag
from deitfast.training.run_record import read_run

TEACHER_SEED = 100
"""Seed of what teaches: of none of the table's runs."""
_CURVE = 60


@dataclass(frozen=True)
class Table:
    """What all runs of a table have in common.

    recipe: its base, with `data`. name: the recipe's, as `deitfast train` takes it. out: JSON of every run, table and
    pictures; beside them runs/, which holds the run folders. teacher_epochs: passes of a convnet teacher. quick: few
    steps, untrained transformers as teachers.
    """

    name: str
    recipe: Recipe
    out: Path
    teacher_epochs: int
    teacher_width: int
    quick: bool = False

    @property
    def image_size(self) -> int:
        return self.recipe.image_size or find_variant(self.recipe.model).image_size

    def folder(self, run: str, seed: int) -> Path:
        return self.out / "runs" / f"{slug(run)}-{seed}"

    def file(self, run: str, seed: int) -> Path:
        return self.out / f"{slug(run)}-{seed}.json"


def slug(run: str) -> str:
    return run.replace(", ", "-").replace(" ", "-")


def write_subset(data: str, folder: Path, train_images: int, val_images: int | None = None) -> None:
    """The first so many images of every class (None: all) of both splits of `data`, as tar shards in `folder`."""
    if all((folder / f"{split}.tar").exists() for split in ("train", "val")):
        return
    found = open_dataset(data)
    assert found.train is not None
    assert found.val is not None
    folder.mkdir(parents=True, exist_ok=True)
    for split, manifest, images in (("train", found.train, train_images), ("val", found.val, val_images)):
        of_class = [np.flatnonzero(manifest.label == label)[:images] for label in range(len(found.classes))]
        index = np.sort(np.concatenate(of_class))
        write_atomically(folder / f"{split}.tar", partial(_write_shard, manifest, index))


def write_share(data: str, folder: Path, share: int) -> None:
    """The first of every class's training images, one in `share` of them, and all validation images."""
    train = open_dataset(data, "train", quiet=True).train
    assert train is not None
    write_subset(data, folder, len(train) // len(train.classes) // share)


def _write_shard(manifest: Manifest, index: np.ndarray, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i in index.tolist():
            suffix = Path(manifest.name(i)).suffix
            add_member(tar, f"{manifest.classes[manifest.label[i]]}/{i:06d}{suffix}", manifest.read(i).tobytes())


def recipe_of(table: Table, run: Run, seed: int) -> Recipe:
    """The run as a recipe. Its teacher and its start must have been made (`prerequisites`)."""
    base = table.recipe
    changes = dict(run.changes)
    if run.distilled:
        changes["model"] = distilled_name(base.model)
    if run.teacher:
        changes["teacher"] = teacher_of(table, run.teacher)
    if run.share > 1:
        changes["data"] = str(table.out / "runs" / f"data-{run.share}")
    if run.start:
        changes["init"] = str(table.folder(run.start, seed) / "best")
    epochs = base.epochs * run.longer * run.share
    changes["eval_every"] = epochs
    return replace(base, epochs=epochs, seed=seed, out=str(table.folder(run.name, seed)), **changes)


def distilled_name(model: str) -> str:
    """The same model with the distillation token."""
    return model.replace("_patch", "_distilled_patch", 1)


def teacher_of(table: Table, teacher: str) -> str:
    """What `--teacher` takes."""
    if teacher != TRANSFORMER:
        return str(table.out / "runs" / f"{slug(teacher)}.pt2")
    return f"{table.recipe.model}:" + ("fresh" if table.quick else str(table.folder(BASE, TEACHER_SEED) / "best"))


def make_ready(table: Table, run: Run, seed: int) -> None:
    """Train whatever the run starts from or is taught by and is not there yet."""
    if run.share > 1:
        write_share(table.recipe.data, table.out / "runs" / f"data-{run.share}", run.share)
    if run.start:
        _make_weights(table, run.start, seed)
    if run.teacher in (TRANSFORMER, EQUAL_CONVNET) and not table.quick:
        _make_weights(table, BASE, TEACHER_SEED)
    if run.teacher in (CONVNET, EQUAL_CONVNET) and not Path(teacher_of(table, run.teacher)).exists():
        train_convnet(table, run.teacher)


def _make_weights(table: Table, run: str, seed: int) -> None:
    """Train the run where its weights are not at hand, also one that was written down on another machine."""
    if not (table.folder(run, seed) / "best").exists():
        table.file(run, seed).unlink(missing_ok=True)
    train(table, Run(run), seed)


def train_convnet(table: Table, name: str) -> None:
    """Train a convnet teacher and write it down; the transformer's equal stops at the epoch that reaches its top-1."""
    data = open_dataset(table.recipe.data, quiet=True)
    assert data.train is not None
    assert data.val is not None
    val = convnets.pixels(data.val, table.image_size)
    enough = 100.0
    if name == EQUAL_CONVNET and not table.quick:
        enough = json.loads(table.file(BASE, TEACHER_SEED).read_text())["scores"]["ema"]["top1"]
    began = time.process_time()
    network, top1 = convnets.train(
        convnets.pixels(data.train, table.image_size), len(data.classes), table.teacher_epochs, TEACHER_SEED,
        width=table.teacher_width, until=(enough, val),
    )  # fmt: skip
    path = Path(teacher_of(table, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    convnets.export(network, path, table.image_size)
    made = {
        "run": name, "seed": TEACHER_SEED, "parameters": sum(p.numel() for p in network.parameters()), "top1": top1,
        "epochs": table.teacher_epochs, "width": table.teacher_width, "cpu_seconds": time.process_time() - began,
        "facts": facts(),
    }  # fmt: skip
    _write(table.file(name, TEACHER_SEED), made)


def train(table: Table, run: Run, seed: int) -> dict[str, Any]:
    """The run's scores and all that belongs to them; read where they are written already.

    Its seconds are those of all of it, evaluation included, but of the last start alone. A run that was killed goes on
    from its newest checkpoint. Raises SystemExit(75) when a signal asks to stop.
    """
    path = table.file(run.name, seed)
    if path.exists():
        return json.loads(path.read_text())
    make_ready(table, run, seed)
    recipe = recipe_of(table, run, seed)
    if run.by_timm:
        return train_by_timm(table, run, recipe)
    if run.processes > 1:
        return train_by_processes(table, run, recipe)
    before, cpu, wall = _steps(recipe), time.process_time(), time.monotonic()
    result = deitfast.train(recipe)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    scores = {"raw": asdict(result.raw)} | ({"ema": asdict(result.ema)} if result.ema else {})
    images = (result.step - before) * recipe.batch
    done = {
        "run": run.name, "seed": seed, "command": command(table, recipe), "steps": result.step, "scores": scores,
        "images": images, "cpu_seconds": cpu, "wall_seconds": wall, "images_per_cpu_second": images / cpu,
        "engine": result.engine, "loss": curve(Path(recipe.out)), "facts": facts(),
    }  # fmt: skip
    _write(path, done)
    return done


def train_by_timm(table: Table, run: Run, recipe: Recipe) -> dict[str, Any]:
    """A run of `timm_loop`, written down like the engine's; one that was killed begins anew."""
    cpu, wall = time.process_time(), time.monotonic()
    found = timm_loop.train(recipe, recipe.device if recipe.device != "auto" else "cpu")
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    images = found.steps * recipe.batch
    done = {
        "run": run.name, "seed": recipe.seed, "steps": found.steps,
        "command": f"python -m benchmarks.timm_loop --recipe {table.name} --data {recipe.data} --seed {recipe.seed} "
        f"--epochs {recipe.epochs} --warmup-epochs {recipe.warmup_epochs}",
        "scores": {"raw": {"top1": found.raw}, "ema": {"top1": found.ema}}, "images": images,
        "cpu_seconds": cpu, "wall_seconds": wall, "images_per_cpu_second": images / cpu,
        "engine": "plain loop of timm's parts", "loss": found.loss, "facts": facts(),
    }  # fmt: skip
    _write(table.file(run.name, recipe.seed), done)
    return done


def train_by_processes(table: Table, run: Run, recipe: Recipe) -> dict[str, Any]:
    """A run of several processes under the launcher, written down from its record."""
    words = [*shlex.split(command(table, recipe)), "--processes", str(run.processes), "--wire", run.wire]
    before, cpu, wall = _steps(recipe), _cpu_of_children(), time.monotonic()
    ended = subprocess.run([sys.executable, "-m", *words, "--out", recipe.out])
    if ended.returncode:
        raise SystemExit(ended.returncode)
    cpu, wall = _cpu_of_children() - cpu, time.monotonic() - wall
    evaluated = read_run(Path(recipe.out)).evaluations
    last = evaluated[-1]
    images = (last["step"] - before) * recipe.batch
    done = {
        "run": run.name, "seed": recipe.seed, "command": shlex.join(words), "steps": last["step"],
        "scores": {"raw": {"top1": last["top1"]}, "ema": {"top1": last["ema_top1"]}}, "images": images,
        "cpu_seconds": cpu, "wall_seconds": wall, "images_per_cpu_second": images / cpu,
        "engine": f"{run.processes} processes, gradients summed in {run.wire}", "loss": curve(Path(recipe.out)),
        "facts": facts(),
    }  # fmt: skip
    _write(table.file(run.name, recipe.seed), done)
    return done


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(table: Table, recipe: Recipe) -> str:
    """The run by itself, as a command."""
    words: list[str] = []
    stated = load_recipe(table.name)
    for f in fields(Recipe):
        value = getattr(recipe, f.name)
        if f.name in ("data", "seed") or (value != getattr(stated, f.name) and f.name != "out"):
            words += [flag(f.name), shlex.quote(str(value))]
    return f"deitfast train {table.name} " + " ".join(words)


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) along a run, means over equal stretches."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    size = max(1, -(-len(losses) // _CURVE))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [(part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)) for part in parts]


def _steps(recipe: Recipe) -> int:
    """Steps that the run has behind it already."""
    try:
        newest = Path(recipe.out) / "ckpt" / (Path(recipe.out) / "ckpt" / "latest").read_text().strip()
        return int(json.loads((newest / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
