"""Which files of a folder are images: by name where that tells, by their first bytes where it does not. And tars."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

# Images of the second set cannot be used, but must be named rather than passed over.
SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".pjpeg": "JPEG", ".pjp": "JPEG",
    ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP",
}  # fmt: skip
_FOREIGN_SUFFIXES = {".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".heif", ".jp2"}
_SYSTEM_FOLDERS = {
    "@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "@recycle", "@recently-snapshot",
    "system volume information", "#snapshot", "__pycache__",
}  # fmt: skip
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "picasa.ini"}
_HEAD = 16


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name was left by an editor, a desktop or a file server: no user's image."""
    return name.startswith(".") or name.endswith("~") or name.lower() in _SYSTEM_FOLDERS | _SYSTEM_FILES


def named_as_image(name: str) -> bool:
    """Whether a file's name is that of an image, also of a kind that cannot be used."""
    suffix = os.path.splitext(name)[1].lower()
    return not is_hidden(name) and (suffix in SUFFIXES or suffix in _FOREIGN_SUFFIXES)


def begins_as_image(head: bytes) -> bool:
    """Whether a file's first bytes are those of a JPEG, PNG, BMP, WebP, GIF, TIFF or HEIF image."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")):
        return True
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4)  # two fields that are always zero: any text may begin with BM
    return (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:8] == b"ftyp"


def is_image(path: str | Path) -> bool:
    """Whether a file is an image by its name or, where that says nothing, by its first bytes."""
    name = os.path.basename(path)
    if is_hidden(name) or named_as_image(name):
        return not is_hidden(name)
    try:
        with open(path, "rb") as file:
            return begins_as_image(file.read(_HEAD))
    except OSError:
        return False


def images_below(root: str | Path) -> Iterator[str]:
    """Paths of the images in a folder and all below it, links followed, each folder once, hidden ones left out."""
    seen = set[tuple[int, int]]()
    for base, folders, files in os.walk(root, followlinks=True):
        state = os.stat(base)
        if (state.st_dev, state.st_ino) in seen:  # a link to a folder that contains it
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (path for name in files if is_image(path := os.path.join(base, name)))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file with time 0 to a tar; the offset at which its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
