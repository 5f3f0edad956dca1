"""Rows 2, 10, 11 and 12: saves that are killed, bits that flip, folders that vanish, disks that are full."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.harness import (
    NOT_RUN,
    ROOT,
    Launched,
    assert_same,
    flip_bit,
    reached,
    reference,
    running,
    until,
    until_step,
)  # fmt: skip

# A process that does nothing but save, and says after each save which one is on the disk.
SAVING = """
import sys
from pathlib import Path
import torch
from deitfast.training.checkpoint import Checkpoint, save
generator = torch.Generator().manual_seed(0)
tensors = {stem: {"w": torch.randn(200_000, generator=generator)} for stem in ("model", "ema", "optim")}
first = int(sys.argv[2])
for step in range(first, first + 10_000):
    save(Path(sys.argv[1]), Checkpoint(step, tensors, {"best": None, "steps_per_epoch": 10}))
    print(step, flush=True)
"""


def killed_saves(folder: Path, count: int) -> str:
    """Row 2: SIGKILL at a random moment of a save: none that was acknowledged is lost, the next start saves again."""
    from deitfast.training.checkpoint import load_newest

    out, chooser, acknowledged, saves = folder / "saves", random.Random(2), 0, 0
    for _ in range(count):
        command = [sys.executable, "-c", SAVING, str(out), str(acknowledged + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout
        first = process.stdout.readline()
        assert first, "a killed save stops every later one"
        time.sleep(chooser.random() * 0.3)
        process.kill()
        lines = [first, *process.stdout.readlines()]
        process.wait()
        saves += len(lines)
        acknowledged = int(lines[-1])
        found = load_newest(out, print)
        assert found is not None
        assert found.step >= acknowledged, f"step {acknowledged} was acknowledged, step {found.step} is there"
        acknowledged = found.step
    return f"{count} kills, {saves} acknowledged saves, 0 lost"


def flipped_bits(folder: Path, count: int) -> str:
    """Row 10: every flipped bit is found, at a resume and when weights are used."""
    from deitfast.errors import DeitfastError
    from deitfast.integrity import damage, steps_newest_first
    from deitfast.model.weights import read_weights

    whole, chooser = reference(folder), random.Random(10)
    out = folder / "flipped"
    shutil.copytree(whole, out)
    newest = steps_newest_first(out / "ckpt")[0]
    files = [*sorted(newest.glob("*.safetensors")), newest / "state.json"]
    best = out / "best" / "model.safetensors"
    header = int.from_bytes(best.read_bytes()[:8], "little") + 8
    refused = 0
    for turn in range(count):
        path = files[turn % len(files)]
        before = path.read_bytes()
        flip_bit(path, chooser)
        assert damage(newest), f"a flipped bit in {path.name} went unnoticed"
        path.write_bytes(before)
        before = best.read_bytes()
        data = bytearray(before)
        data[chooser.randrange(header, len(data))] ^= 1 << chooser.randrange(8)
        best.write_bytes(data)
        try:
            read_weights(out)
        except DeitfastError:
            refused += 1
        best.write_bytes(before)
    assert refused == count, f"{count - refused} flips in best/ loaded silently"
    flip_bit(newest / "optim.safetensors", chooser)
    with running(out) as run:
        assert run.wait() == 0, run.text()[-2000:]
        assert "optim.safetensors sha256 mismatch. Using step-" in run.text(), run.text()[-2000:]
    assert_same(whole, out)
    return f"{count} flips in a checkpoint and {count} in best/: all found; resumed from the one before, bitwise"


def lost_folders(folder: Path, count: int) -> str:
    """Row 11: truncated, missing, stray, renamed: the newest whole one or a refusal, never a start from zero."""
    whole = reference(folder)
    kept = {name: (whole / name).read_bytes() for name in ("metrics.jsonl", "best/model.safetensors")}

    def hurt(name: str) -> Path:
        out = folder / f"hurt-{name}"
        shutil.copytree(whole, out)
        return out

    def goes_on(out: Path, words: str = "") -> None:
        with running(out, processes=1) as run:
            assert run.wait() == 0, run.text()[-2000:]
            assert words in run.text(), run.text()[-2000:]

    def refuses(out: Path, words: str) -> None:
        with running(out, processes=1) as run:
            assert run.wait() == 2, run.text()[-2000:]
            assert words in run.text(), run.text()[-2000:]
            assert "Traceback" not in run.text(), run.text()[-2000:]
        assert all((out / name).read_bytes() == data for name, data in kept.items()), "something was overwritten"

    emptied = hurt("emptied")
    shutil.rmtree(emptied / "ckpt")
    refuses(emptied, "no checkpoint is in")
    renamed = hurt("renamed")
    for path in (renamed / "ckpt").glob("step-*"):
        path.rename(path.with_name(f"old-{path.name}"))
    refuses(renamed, "Put its step-* folders back, or start anew with another --out")
    stray = hurt("stray")
    (stray / "ckpt" / ".tmp-1-latest").write_text("step-00")
    (stray / "ckpt" / "latest").write_bytes(b"\xff")
    (stray / "metrics.jsonl").write_bytes(kept["metrics.jsonl"] + b'{"step": "3"}\n\xff\xfe\n{"st')
    goes_on(stray)
    cut = hurt("cut")
    newest = max((cut / "ckpt").glob("step-*"))
    os.truncate(newest / "model.safetensors", 1000)
    goes_on(cut, "model.safetensors has 1000 of")
    (cut / "images.npz").unlink()
    goes_on(cut, "images.npz is missing: nobody can tell whether")
    (cut / "recipe.json").write_text("[]")
    with running(cut, processes=1) as run:
        assert run.wait() == 2, run.text()[-2000:]
        assert "recipe.json cannot be read" in run.text()
    return "ckpt/ emptied or renamed: refused, nothing overwritten; stray, foreign and cut files: gone on with, told"


def full_disk(folder: Path, count: int) -> str:
    """Row 12: a disk that fills up and is freed again: training goes on, warns, tries again, ends bitwise equal."""
    whole, disk = reference(folder), folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)], capture_output=True).returncode:
        return NOT_RUN + "no permission to mount a tmpfs"
    try:
        out, filler = disk / "run", disk / "filler"
        with running(out, said=folder / "full.said") as run:
            until_step(run, 3)
            with contextlib.suppress(OSError), open(filler, "wb") as file:
                while True:
                    file.write(bytes(1 << 20))
            until(lambda: faults_said(run) >= 1, "a failed save told", run)
            assert not list((out / "ckpt").glob(".tmp-*/*")), "a half-written checkpoint holds space"
            filler.unlink()
            assert run.wait() == 0, run.text()[-3000:]  # so short a run tries again at its end
        assert reached(out)["saved"] == reached(out)["step"]
        said = faults_said(run)
        assert_same(whole, out, losses_too=False)  # lines that found no space are lost
        with running(disk / "none", processes=1, said=folder / "none.said") as run:
            with open(filler, "wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
            run.wait()
            assert "Traceback" not in run.text(), run.text()[-3000:]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return f"full from step 3 on: {said} failed saves told, training went on; freed: saved, bitwise at the end"


def faults_said(run: Launched) -> int:
    return run.text().count("not written: ")
