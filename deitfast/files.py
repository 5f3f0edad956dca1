"""Files: where this machine keeps what deitfast found out or fetched once; JSON; writing in full or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of one a line; none without it. Lines that a crash cut off are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write_atomically` of an object."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


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
