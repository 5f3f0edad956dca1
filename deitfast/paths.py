"""Where this machine keeps what deitfast found out or fetched once. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Folder of cached files of one kind (`manifests`, `weights`); not created here.

    $DEITFAST_HOME/kind, else $XDG_CACHE_HOME/deitfast/kind, else ~/.cache/deitfast/kind. An empty variable counts as
    unset.
    """
    home = os.environ.get("DEITFAST_HOME")
    if home:
        return Path(home).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deitfast" / kind
