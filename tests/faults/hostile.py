"""Rows 14 and 18: images that cannot be used, and files that were made to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.data.conftest import picture
from tests.data.test_bad_files import damage, flip_a_bit, odd, truncate, vanish
from tests.data.test_sources import add
from tests.faults.harness import ROOT, metrics, running, until_step

TRAINED = 300  # sound images a class


def bad_images(folder: Path, count: int) -> str:
    """Row 14: 1 % of every bad kind: named by the scan, left out, counted in the run; over the limit it stops."""
    data = folder / "data"
    for split, images in (("train", TRAINED), ("val", 8)):
        for c, label in enumerate(("ape", "bat")):
            (data / split / label).mkdir(parents=True)
            for i in range(images):
                picture(24 + i % 9, 24 + i % 7, 1000 * c + i).save(data / split / label / f"{i:03d}.jpg", quality=95)
    names = damage(data / "train" / "bat", (data / "train" / "ape" / "000.jpg").read_bytes())
    sound = odd(data / "train" / "ape")
    told = subprocess.run(
        [sys.executable, "-m", "deitfast", "data", "check", str(data), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found = {Path(name).name for name, _ in json.loads(told.stdout)["train"]["damaged"]}
    assert told.returncode == 1, told.stderr
    assert found == names, f"{found ^ names}"
    assert not found & sound
    settings = {"data": data, "epochs": 3, "repeats": 1, "distillation": None, "teacher": None}
    out = folder / "run"
    with running(out, bad_limit=0.01, **settings) as run:
        until_step(run, 3)
        for i, harm in enumerate((vanish, truncate, flip_a_bit)):  # all images come again in every epoch
            harm(data / "train" / "ape" / f"{100 + i}.jpg")
        assert run.wait() == 0, run.text()[-3000:]
    counted = metrics(out, "bad_files")[-1]["bad_files"]
    listed = (out / "bad.txt").read_text()
    assert counted == 3, counted
    assert all(f"{100 + i}.jpg" in listed for i in range(3)), listed
    over = folder / "over"
    with running(over, bad_limit=0.001, **settings) as run:
        until_step(run, 2)
        for i in range(200, 220):
            vanish(data / "train" / "ape" / f"{i}.jpg")
        assert run.wait() == 2, f"{run.process.returncode}\n{run.text()[-3000:]}"
        assert "images turned out unreadable. Fix them" in run.text(), run.text()[-3000:]
    assert (over / "ckpt" / "latest").exists(), "it stopped without a save"
    return (
        f"{len(names)} of {2 * TRAINED} named and left out; 3 harmed in the run: 3 counted, listed; 20: exit 2, saved"
    )


def hostile_files(folder: Path, count: int) -> str:
    """Row 18: mutated files of each kind, and pickles with code: an error of ours, or a file that can be used."""
    command = [sys.executable, "-m", "tests.faults.hostile", str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout.splitlines()[-1]


class _Code:
    """What unpickled would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def _readers(folder: Path) -> dict[str, tuple[str, bytes, Callable[[Path], object]]]:
    """kind -> (file name, a sound file, what reads it)."""
    from deitfast.data import open_dataset
    from deitfast.data.manifest import read_manifest, write_manifest
    from deitfast.data.scan import inspect_image
    from deitfast.model.weights import read_weights, save_weights
    from deitfast.training import checkpoint
    from deitfast.training.checkpoint import Checkpoint

    tensors = {f"blocks.{i}.weight": torch.randn(8, 8) for i in range(4)}
    save_weights(folder / "sound.safetensors", tensors, {"model": "x", "classes": '["a", "b"]'})
    torch.save(tensors, folder / "sound.pth")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    for split in ("train", "val"):
        (folder / "data" / split / "a").mkdir(parents=True)
        (folder / "data" / split / "b").mkdir()
        for label in "ab":
            picture(20, 20, ord(label)).save(folder / "data" / split / label / "0.jpg")
            picture(20, 20, 1 + ord(label)).save(folder / "data" / split / label / "1.png")
    manifest = open_dataset(str(folder / "data"), quiet=True).train
    assert manifest
    write_manifest(folder / "sound.npz", manifest)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for i in range(2):
            add(archive, f"{i}.jpg", (folder / "data" / "train" / "a" / "0.jpg").read_bytes())
            add(archive, f"{i}.cls", str(i).encode())
    step = checkpoint.save(folder / "ckpt", Checkpoint(1, {"model": tensors}, {"steps_per_epoch": 1, "best": None}))

    def weights(path: Path) -> object:
        return read_weights(path)

    def shard(path: Path) -> object:
        return open_dataset(str(path.parent), split="train", quiet=True)

    def image(path: Path) -> object:
        try:
            return inspect_image(path.read_bytes())
        except ValueError:
            return None

    def hashes(path: Path) -> object:
        (step / "manifest.json").write_bytes(path.read_bytes())
        return checkpoint.load_newest(step.parent, lambda _: None)

    data = folder / "data" / "train" / "a"
    return {
        "safetensors": ("x.safetensors", (folder / "sound.safetensors").read_bytes(), weights),
        "pth": ("x.pth", (folder / "sound.pth").read_bytes(), weights),
        "legacy pth": ("x.pth", (folder / "legacy.pth").read_bytes(), weights),
        "tar": ("train.tar", tar.getvalue(), shard),
        "list of images": ("x.npz", (folder / "sound.npz").read_bytes(), read_manifest),
        "JPEG": ("x.jpg", (data / "0.jpg").read_bytes(), image),
        "PNG": ("x.png", (data / "1.png").read_bytes(), image),
        "checkpoint's hashes": ("manifest.json", (step / "manifest.json").read_bytes(), hashes),
    }


def _mutated(data: bytes, chooser: random.Random) -> bytes:
    """A few bytes of the first 2 KiB changed, or anywhere, or the end cut off."""
    out = bytearray(data)
    span = len(out) if chooser.random() < 0.3 else min(2048, len(out))
    for _ in range(chooser.randint(1, 6)):
        out[chooser.randrange(span)] = chooser.randrange(256)
    return bytes(out[: chooser.randrange(len(out))] if chooser.random() < 0.15 else out)


def _pickles(folder: Path, made: Path) -> dict[str, bytes]:
    """Weight files whose pickles run code when they are unpickled."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"w": _Code(made)}, zipped)
    torch.save({"w": _Code(made)}, legacy, _use_new_zipfile_serialization=False)
    npz = io.BytesIO()
    np.savez(npz, version=np.array([_Code(made)], dtype=object))
    bare = io.BytesIO()
    with zipfile.ZipFile(bare, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Code(made)))
    return {"zip.pth": zipped.getvalue(), "legacy.pth": legacy.getvalue(), "raw.pth": pickle.dumps(_Code(made)),
            "bare.pth": bare.getvalue(), "pickled.npz": npz.getvalue()}  # fmt: skip


def _main(folder: Path, count: int) -> None:
    """In a process of its own, whose memory is bounded."""
    from deitfast.data.manifest import read_manifest
    from deitfast.errors import DeitfastError
    from deitfast.guard import quiet_pillow
    from deitfast.model.weights import read_weights

    quiet_pillow()
    readers, chooser, made = _readers(folder), random.Random(18), folder / "executed"
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), held + (2 << 30)))
    refused, usable, slowest = 0, 0, 0.0
    for kind, (name, sound, read) in readers.items():
        for n in range(count):
            path = folder / f"{kind} {n}" / name
            path.parent.mkdir()
            path.write_bytes(_mutated(sound, chooser))
            began = time.monotonic()
            try:
                found = read(path)
            except DeitfastError:
                found = None
            slowest = max(slowest, time.monotonic() - began)
            refused, usable = refused + (found is None), usable + (found is not None)
            path.unlink()
    for name, data in _pickles(folder, made).items():
        (folder / name).write_bytes(data)
        try:
            found = read_manifest(folder / name) if name.endswith("npz") else read_weights(folder / name)
            assert found is None, f"{name} was believed"
        except DeitfastError:
            pass
    assert not made.exists(), "code in a file was run"
    assert slowest < 5, f"{slowest:.1f} s for one file"
    print(f"{refused + usable} mutated files of {len(readers)} kinds: {refused} refused in a line or absent, {usable} "
          f"usable, none above 2 GB or {slowest:.1f} s; 5 pickles with code: none ran")  # fmt: skip


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
