"""Copies of a data set's files on a disk of this machine, made beside the training that reads them.

Network storage is slow for some processes more than for others, and all wait for the slowest. A process reads the copy
of a file once it is there, and the file itself until then; every image's bytes are compared with the checksum that the
scan took, wherever they come from, so a damaged copy costs a second read and nothing else. Copies stay for the next
run: one of the same size and time as its file is taken for it.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deitfast.data.manifest import Manifest, checksum
from deitfast.errors import DeitfastError, first_line
from deitfast.files import write_atomically

_AT_ONCE = 4  # a file of a class folder is mostly latency
_CHUNK = 16 << 20
_STALE_S = 3600.0
SPARE = 0.02
"""Share of the disk that stays free: the run folder may lie there too."""


def staged(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with its copies below `folder`, in one of the data set's own. Raises DeitfastError if it cannot be.

    Nothing is copied here: see `Stage`.
    """
    own = folder.expanduser().resolve() / f"{checksum(os.fsencode(manifest.root)):016x}"
    if own.is_relative_to(manifest.root) or Path(manifest.root).is_relative_to(own):
        raise DeitfastError(f"--stage {folder} lies in the data, {manifest.root}. Give a folder on a local disk")
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeitfastError(f"--stage {folder} cannot be made: {error.strerror or error}") from error
    return replace(manifest, staged=str(own))


class Stage:
    """Copies the files of `staged` manifests, in threads, until `close`; to be made once a machine.

    say: gets a line at the end, and one where the disk is too small or a file cannot be copied; those are read where
    they are.
    """

    def __init__(self, manifests: Sequence[Manifest], say: Callable[[str], None]) -> None:
        self.say = say
        self._folder = manifests[0].staged
        self._manifests = manifests
        self._todo = self._files()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._failed = ""  # the first reason
        self._copied = self._kept = self._bytes = 0
        self._thread = threading.Thread(target=self._run, name="stage", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; what is copied in full stays."""
        self._ended.set()
        self._thread.join()

    def join(self) -> None:
        """Wait until everything is copied that can be."""
        self._thread.join()

    def _files(self) -> Iterator[tuple[str, str]]:
        """(file, its copy); without those of a crafted list that would be written elsewhere."""
        for manifest in self._manifests:
            for name in map(os.fsdecode, manifest.files):
                if not os.path.isabs(name) and ".." not in name.split("/"):
                    yield os.path.join(manifest.root, name), os.path.join(manifest.staged, name)

    def _run(self) -> None:
        began = time.monotonic()
        for folder in {os.path.dirname(target) for _, target in self._files()}:
            _sweep(Path(folder))
        workers = [threading.Thread(target=self._work, name="stage", daemon=True) for _ in range(_AT_ONCE)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        there, count = self._copied + self._kept, sum(1 for _ in self._files())
        if there < count and not self._failed:
            return  # the run is over
        told = f"staged {there:,} of {count:,} files"
        if self._copied:
            told += f", {self._copied:,} copied ({self._bytes / 1e9:,.1f} GB in {time.monotonic() - began:,.0f} s)"
        self.say(f"{told}; {self._failed}. The others are read where they are" if self._failed else told)

    def _work(self) -> None:
        while not self._ended.is_set():
            with self._lock:  # one at a time: a class folder has a million files
                pair = next(self._todo, None)
            if pair is None:
                return
            self._stage(*map(Path, pair))

    def _stage(self, source: Path, target: Path) -> None:
        try:
            there = os.stat(source)
            if _same(target, there):
                with self._lock:
                    self._kept += 1
                return
            disk = shutil.disk_usage(self._folder)
            if disk.free - there.st_size < SPARE * disk.total:
                self._fail(f"{self._folder} has {disk.free / 1e9:,.1f} GB left of {disk.total / 1e9:,.1f}")
                self._ended.set()
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, lambda temporary: self._copy(source, temporary, there))
        except OSError as error:
            self._fail(f"{source} was not copied: {first_line(error)}")
            return
        except _Ended:
            return
        with self._lock:
            self._copied, self._bytes = self._copied + 1, self._bytes + there.st_size

    def _copy(self, source: Path, temporary: Path, there: os.stat_result) -> None:
        with open(source, "rb") as one, open(temporary, "wb") as two:
            while chunk := one.read(_CHUNK):
                if self._ended.is_set():
                    raise _Ended
                two.write(chunk)
        if temporary.stat().st_size != there.st_size:
            raise OSError("it changed in between")
        os.utime(temporary, ns=(there.st_mtime_ns, there.st_mtime_ns))

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failed = self._failed or reason


class _Ended(Exception):
    """The run is over in the middle of a copy."""


def _same(target: Path, there: os.stat_result) -> bool:
    try:
        found = os.stat(target)
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (there.st_size, there.st_mtime_ns)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half copied; a fresh one may be another run's."""
    for stale in folder.glob(".tmp-*"):
        try:
            if time.time() - stale.stat().st_mtime > _STALE_S:
                stale.unlink()
        except OSError:
            continue
