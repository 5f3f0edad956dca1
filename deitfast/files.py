"""Files: where this machine keeps what deitfast found out or fetched once, and writing in full or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder(kind: str) -> Path:
    """Folder of cached files of one kind (`manifests`, `weights`); not created here.

    $DEITFAST_HOME/kind, else $XDG_CACHE_HOME/deitfast/kind, else ~/.cache/deitfast/kind. An empty variable counts as
    unset.
    """
    home = os.environ.get("DEITFAST_HOME")
    if home:
        return Path(home).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deitfast" / kind


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, fsync it, and rename it to `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=f"-{path.name}")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's is for the owner alone
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
