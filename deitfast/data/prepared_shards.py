"""`deitfast data prepare`: any source as tar shards with a manifest, for fewer files and no scan at the next start.

    OUT/train-00000.tar ...      WebDataset's layout, NUMBER_NAME.jpg beside NUMBER_NAME.cls; bytes as they were, or
                                 re-encoded where the short side is reduced
    OUT/classes.txt              class names in label order
    OUT/train.manifest.npz       place, label, size and checksum of every image
    OUT/prepare.json             from what and how; a second call with the same settings goes on where the first stopped

Each shard is written to a temporary file and renamed, with its part of the manifest beside it until the end.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deitfast.data.cores import cores
from deitfast.data.files import add_member
from deitfast.data.manifest import FORMATS, PER_IMAGE, Manifest, read_manifest, strings, write_manifest
from deitfast.data.scan import FACTS, Facts, columns, inspect_image, progress
from deitfast.data.sources import Dataset
from deitfast.errors import DeitfastError
from deitfast.files import write_atomically
from deitfast.guard import quiet_pillow

_SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp"}
_SETTINGS = "prepare.json"


@dataclass(frozen=True)
class Settings:
    """short_side: pixels to which a longer short side is reduced; 0: bytes are copied. quality: of JPEGs then made."""

    short_side: int = 0
    quality: int = 95
    per_shard: int = 1000

    def check(self) -> None:
        limits = {"short_side": (0, 4096), "quality": (50, 100), "per_shard": (1, 1_000_000)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                flag = "--" + name.replace("_", "-")
                raise DeitfastError(f"{flag} is {getattr(self, name)}, must be in [{low}, {high}]")


class Done(NamedTuple):
    """What was written: images, shards made now and before, and bytes, over all splits."""

    images: int
    made: int
    found: int
    size: int


def prepare_shards(data: Dataset, out: Path, settings: Settings, workers: int = 0) -> Done:
    """Write both splits of `data` as shards under `out`, then read all of them back and compare checksums.

    workers: processes; 0: one a core; 1: this process. Raises DeitfastError for a folder that holds something else, for
    a full disk, and for shards that read back wrong.
    """
    settings.check()
    splits = data.splits()
    try:
        _claim(out, splits, settings)
        classes = "".join(f"{name}\n" for name in data.classes)
        write_atomically(out / "classes.txt", lambda path: path.write_text(classes))
        done = [_prepare_split(name, m, out, settings, workers or cores()) for name, m in splits.items()]
    except OSError as error:
        raise DeitfastError(
            f"cannot write {error.filename or out}: {error.strerror}. What is finished stays; the same command goes on"
        ) from error
    return Done(*map(sum, zip(*done, strict=True)))


def _claim(out: Path, splits: dict[str, Manifest], settings: Settings) -> None:
    """Make the folder, or make sure that it holds the beginning of the very same work."""
    plan: dict[str, Any] = {"settings": vars(settings), "source": {name: _digest(m) for name, m in splits.items()}}
    out.mkdir(parents=True, exist_ok=True)
    recorded = out / _SETTINGS
    if recorded.exists():
        try:
            same = json.loads(recorded.read_text()) == plan
        except (ValueError, RecursionError):
            same = False
        if not same:
            raise DeitfastError(f"{out} was prepared from other images or with other settings. Give another folder")
        return
    strange = next((p.name for p in out.iterdir()), None)
    if strange:
        raise DeitfastError(f"{out} is not empty: it holds {strange}. Give an empty folder")
    needed = 0 if settings.short_side else sum(int(m.length.sum()) + 2048 * len(m) for m in splits.values())
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DeitfastError(
            f"{out} has {free / 1e9:.1f} GB left, {needed / 1e9:.1f} GB are needed. Give another folder"
        )
    write_atomically(recorded, lambda path: path.write_text(json.dumps(plan, indent=1) + "\n"))


def _digest(manifest: Manifest) -> str:
    """A name for the images and labels of a manifest, wherever they lie."""
    h = hashlib.blake2b(digest_size=16)
    h.update(manifest.checksum.tobytes() + manifest.label.tobytes() + repr(manifest.classes).encode())
    return h.hexdigest()


def _prepare_split(split: str, manifest: Manifest, out: Path, settings: Settings, workers: int) -> Done:
    final = out / f"{split}.manifest.npz"
    starts = range(0, len(manifest), settings.per_shard)
    paths = [out / f"{split}-{number:05d}.tar" for number in range(len(starts))]
    missing = [n for n, path in enumerate(paths) if not (path.exists() and (_part(path).exists() or final.exists()))]
    jobs = ((paths[n], starts[n], _section(manifest, starts[n], settings), settings) for n in missing)
    with progress(f"{split}: writing shards", len(missing)) as tick:
        if workers == 1:
            for job in jobs:
                _make_shard(*job)
                tick()
        elif missing:
            # A server that forks: workers begin with the package imported and without this process's threads.
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])
            with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context, initializer=quiet_pillow) as pool:
                for future in as_completed([pool.submit(_make_shard, *job) for job in jobs]):
                    future.result()
                    tick()

    if missing or not final.exists():
        parts = [read_manifest(_part(path), out) for path in paths]
        lost = next((path for path, part in zip(paths, parts, strict=True) if part is None), None)
        if lost is not None:
            lost.unlink()
            raise DeitfastError(f"{_part(lost)} is missing or damaged. Run the same command again to redo that shard")
        write_manifest(final, _joined([p for p in parts if p is not None]))
    whole = read_manifest(final, out)
    if whole is None or len(whole) != len(manifest):
        final.unlink(missing_ok=True)
        raise DeitfastError(f"{final} is damaged. Run the same command again")
    _verify(split, whole, workers)
    for path in paths:
        _part(path).unlink(missing_ok=True)
    return Done(len(whole), len(missing), len(paths) - len(missing), sum(path.stat().st_size for path in paths))


def _part(shard: Path) -> Path:
    """The shard's part of the manifest."""
    return shard.with_name(f".{shard.stem}.npz")


def _section(manifest: Manifest, start: int, settings: Settings) -> Manifest:
    """The images of one shard as a manifest that is small enough to be sent to a worker."""
    part = manifest.take(slice(start, start + settings.per_shard))
    used, file_id = np.unique(part.file_id, return_inverse=True)
    return replace(part, files=part.files[used], file_id=file_id, bad=())


def _make_shard(path: Path, start: int, manifest: Manifest, settings: Settings) -> None:
    """Write the images of a section, numbered from `start` on, as one shard, and its part of the manifest."""
    names: list[str] = []
    offsets: list[int] = []
    facts: list[Facts] = []

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(len(manifest)):
                data = _encoded(manifest, i, settings)
                facts.append(inspect_image(data, whole=False))
                key = f"{start + i:08d}_{_plain(manifest.name(i))}"
                names.append(key + _SUFFIX[FORMATS[facts[-1].format]])
                offsets.append(add_member(tar, names[-1], data))
                add_member(tar, f"{key}.cls", b"%d" % manifest.label[i])

    write_atomically(path, write)
    part = Manifest(
        root="",
        files=strings([path.name]),
        file_id=np.zeros(len(names), np.int64),
        member=strings(names),
        offset=np.array(offsets, np.int64),
        label=manifest.label,
        classes=manifest.classes,
        **columns(np.array(facts, FACTS)),
    )
    write_manifest(_part(path), part)


def _encoded(manifest: Manifest, i: int, settings: Settings) -> bytes:
    """The bytes of image i, or where it is too large a JPEG of it."""
    width, height = int(manifest.width[i]), int(manifest.height[i])
    short = min(width, height)
    if not settings.short_side or short <= settings.short_side:
        return manifest.read(i).tobytes()
    from PIL import Image

    width, height = (max(round(side * settings.short_side / short), 1) for side in (width, height))
    buffer = io.BytesIO()
    image = Image.fromarray(manifest.rgb(i)).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=settings.quality)
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A file name's stem in characters that any tar reader takes: no dot, at which a WebDataset key would end."""
    stem = os.path.splitext(os.path.basename(name))[0]
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in stem)[:60]


def _joined(parts: list[Manifest]) -> Manifest:
    """The manifests of single shards as one."""
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in PER_IMAGE}
    arrays["file_id"] = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    return replace(parts[0], files=np.concatenate([p.files for p in parts]), **arrays)


def _verify(split: str, manifest: Manifest, workers: int) -> None:
    """Read every image back; `read` compares the checksum."""

    def broken(i: int) -> str | None:
        try:
            manifest.read(i)
        except DeitfastError:
            return manifest.name(i)
        return None

    with progress(f"{split}: verifying", len(manifest)) as tick, ThreadPoolExecutor(workers) as pool:
        for name in pool.map(broken, range(len(manifest))):
            if name is not None:
                shard = Path(manifest.root) / name.split("/")[0]
                shard.unlink()
                (Path(manifest.root) / f"{split}.manifest.npz").unlink()
                raise DeitfastError(f"{name} read back wrong. Its shard was removed; run the same command again")
            tick()
