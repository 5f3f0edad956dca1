"""What Triton needs of a machine with a GPU before its first kernel: a C compiler and Python's headers."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from deitfast.errors import DeitfastError


def check_compiler() -> None:
    """Raise DeitfastError where the first Triton kernel on a GPU could not be launched for want of a C compiler.

    Triton builds a small C module on its first use and keeps it in its cache, so a machine that has it needs neither.
    """
    missing = missing_for_triton()
    if missing and not _is_built():
        raise DeitfastError(f"Triton builds a small C module before its first kernel, and {missing}")


def missing_for_triton() -> str:
    """What a build by Triton would lack here, and the remedy, in words; empty where nothing is missing.

    It compiles with CC, gcc or clang, against the headers of the Python that runs (triton/runtime/build.py).
    """
    named = os.environ.get("CC")
    if named and not shutil.which(named):
        return f"CC names {named}, which is no program here. Unset CC, or name a C compiler that is installed"
    if not named and not shutil.which("gcc") and not shutil.which("clang"):
        return "this machine has no C compiler. Install gcc (apt-get install gcc), or name one in CC"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(include, "Python.h").exists():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"there is no Python.h in {include}. Install {version}-dev (apt-get) or {version}-devel (dnf), or use a "
            "Python that comes with its headers"
        )
    return ""


def _is_built() -> bool:
    """Whether Triton's module can be loaded as it stands."""
    try:
        from triton.runtime import driver

        return driver.active is not None
    except Exception:  # of Triton, of the linker, of subprocess: whatever it is, nothing can be launched
        return False
