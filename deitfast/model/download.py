"""Files from the net, once: resumed where they broke off, checked by hash, whole or absent. No torch here.

A file is written beside its place as `NAME.part` and renamed when it is whole and its hash is right. A broken
connection is taken up again with a Range request for as long as it brings new bytes; the part of a process that was
killed is taken up by the next one. What turns out to be wrong is deleted. One process of a machine downloads at a
time; the others wait for its file.

DEITFAST_OFFLINE=1 or HF_HUB_OFFLINE=1 forbids the net: then only files that are there already are used.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deitfast.errors import DeitfastError
from deitfast.integrity import sha256 as sha256_of

_TIMEOUT_S = 30.0
_RETRIES = 3  # in a row, without a new byte
_PAUSE_S = 0.5
_CHUNK = 1 << 20
_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
_ELSEWHERE = "Download it elsewhere and give its path"


def is_url(source: object) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def offline() -> bool:
    """Whether the environment forbids the net."""
    names = ("DEITFAST_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def open_url(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """The answer to a request, a file to read from. Raises what urllib does."""
    request = urllib.request.Request(url, headers={"User-Agent": "deitfast", **(headers or {})})
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)


def fetch(url: str, folder: Path, sha256: str = "") -> Path:
    """The file at `url` in `folder`, downloaded unless it is there.

    sha256: the first hexadecimal digits that its hash must have, as many as are known; where empty, those at the end of
    the file's name (`NAME-a1311bcf.pth`) count. Raises DeitfastError for whatever keeps the file from being there.
    """
    name = url.split("?", 1)[0].rsplit("/", 1)[1]
    if not name or name.startswith("."):
        raise DeitfastError(f"{url} names no file. Give the address of a weight file")
    target, part = folder / name, folder / f"{name}.part"
    if target.is_file():
        return target
    if offline():
        raise DeitfastError(f"{target} is not there, and DEITFAST_OFFLINE or HF_HUB_OFFLINE forbids fetching {url}")
    named = _NAMED_HASH.search(name)
    expected = sha256 or (named[1] if named else "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{name}.lock"):
            if not target.is_file():
                resumed = part.exists()
                _download(url, part)
                if resumed and not sha256_of(part).startswith(expected):  # its beginning was of another file
                    part.unlink()
                    _download(url, part)
                _check(url, part, expected)
                os.replace(part, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise DeitfastError(
            f"cannot keep {target}: {error.strerror or error}. Set DEITFAST_HOME to another folder"
        ) from error
    return target


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the system frees with the process, and leave no file behind."""
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
                continue  # its last holder deleted it while this process waited: another one counts now
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _download(url: str, part: Path) -> None:
    """Fill `part` from its present length on; DeitfastError, with `part` gone, where that cannot be done."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _receive(url, part, before):
                return
            problem: str = "the answer broke off"
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # the part is longer than the file, or already all of it
                part.unlink()
                problem = "the server refuses to resume"
            else:
                part.unlink(missing_ok=True)
                raise DeitfastError(f"{url} answered {error.code} {error.reason}. {_ELSEWHERE}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > before else failures + 1
        if failures == _RETRIES:
            part.unlink(missing_ok=True)
            raise DeitfastError(f"could not fetch {url} ({problem}). {_ELSEWHERE}")
        time.sleep(_PAUSE_S)


def _receive(url: str, part: Path, start: int) -> bool:
    """Append what the server sends from byte `start` on; whether the file is whole then."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with open_url(url, headers) as answer:
        resumed = answer.status == 206
        left = answer.headers.get("Content-Length")
        with open(part, "ab" if resumed else "wb") as file:
            written = 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                written += len(chunk)
            file.flush()
            os.fsync(file.fileno())
    return left is None or written == int(left)


def _check(url: str, part: Path, expected: str) -> None:
    """Refuse, and delete, a page of HTML, an empty answer and a wrong hash."""
    with open(part, "rb") as file:
        head = file.read(256).lstrip().lower()
    found = sha256_of(part)
    problem = ""
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "answered with a page of HTML instead of a file"
    elif not head:
        problem = "answered with an empty file"
    elif not found.startswith(expected):
        problem = f"has sha256 {found[: max(len(expected), 8)]}..., expected {expected}: it is damaged or another file"
    if problem:
        part.unlink()
        raise DeitfastError(f"{url} {problem}. {_ELSEWHERE}")
