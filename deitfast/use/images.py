"""Images of any kind to what evaluation feeds a model: uint8, resized and centre-cropped as there.

A photo given as a file, a URL, bytes, a PIL image or an array is brought to RGB, its short side resized to
int(image_size / crop_ratio) with PIL's antialiased bicubic, and the centre cut out. EXIF orientation is ignored, as in
training and evaluation.
"""

from __future__ import annotations

import glob
import io
import os
import urllib.error
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deitfast.data import EvalLoader, Manifest
from deitfast.data.cores import thread_count
from deitfast.data.eval_loader import eval_geometry, is_long, middle
from deitfast.data.files import images_below, is_image
from deitfast.data.manifest import FORMATS, most_pixels, strings, to_rgb
from deitfast.data.scan import FACTS, columns, inspect_image
from deitfast.errors import DeitfastError, did_you_mean
from deitfast.model.download import is_url, offline, open_url
from deitfast.model.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

DALI_FROM = 64
"""Files from which on a GPU decodes them through DALI: below, PIL is done before DALI has started."""

_LARGEST_DOWNLOAD = 64 << 20


def find_images(patterns: Iterable[str]) -> list[str]:
    """The files (and URLs) that paths, folders and globs stand for: folders with everything below, each sorted by name.

    Raises DeitfastError for a pattern that stands for nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if is_url(pattern) or path.is_file():
            found.append(pattern)
            continue
        inside = images_below(path) if path.is_dir() else glob.glob(str(path), recursive=True)
        images = sorted(p for p in inside if path.is_dir() or (os.path.isfile(p) and is_image(p)))
        if not images:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = did_you_mean(path.name, siblings) or " Give a file, a folder of images, a glob in quotes, or a URL"
            raise DeitfastError(f"no image at {pattern}.{hint}")
        found += images
    return found


def name_of(source: Any, i: int = 0) -> str:
    """What to call image number `i` of a list in a message."""
    return str(source) if isinstance(source, (str, os.PathLike)) else f"image {i}"


def open_image(source: Any, name: str = "") -> PILImage:
    """The image as RGB. source: path, URL, encoded bytes, PIL image, or uint8 array (H, W, 3), RGB, or (H, W), grey.

    Raises DeitfastError, with the name, for what is no readable image of at most 178 million pixels, or as many as
    DEITFAST_MAX_PIXELS says.
    """
    from PIL import Image

    name = name or name_of(source)
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, (np.ndarray, Tensor)):
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
            what = f"{name} is an array {array.shape} of {array.dtype}"
            raise DeitfastError(f"{what}. Give uint8, (height, width, 3) in RGB, or (height, width) in grey")
        return Image.fromarray(array.squeeze(-1) if array.shape[-1:] == (1,) else array).convert("RGB")
    most = most_pixels()
    too_many = f"more than {most:,} pixels. Reduce it, or set DEITFAST_MAX_PIXELS"
    try:
        data: Any = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        if is_url(source):
            data = io.BytesIO(_download(source))
        with Image.open(data, formats=FORMATS) as image:
            if image.width * image.height > most:
                raise DeitfastError(f"{name} has {image.width} x {image.height} pixels, {too_many}")
            return to_rgb(image)
    except DeitfastError:
        raise
    except Image.UnidentifiedImageError:
        raise DeitfastError(f"{name} is not a JPEG, PNG, BMP or WebP image") from None
    except Image.DecompressionBombError:
        raise DeitfastError(f"{name} has {too_many}") from None
    except OSError as error:
        raise DeitfastError(f"{name} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Pillow's decoders raise many kinds; each of them means the file is not usable
        raise DeitfastError(f"{name} does not decode: {error}") from error


def _download(url: str) -> bytes:
    if offline():
        raise DeitfastError(f"DEITFAST_OFFLINE or HF_HUB_OFFLINE forbids fetching {url}")
    try:
        with open_url(url) as answer:
            data = answer.read(_LARGEST_DOWNLOAD + 1)
    except urllib.error.URLError as error:
        raise DeitfastError(f"could not fetch {url} ({getattr(error, 'reason', error)})") from error
    if len(data) > _LARGEST_DOWNLOAD:
        raise DeitfastError(f"{url} is larger than {_LARGEST_DOWNLOAD >> 20} MiB")
    return data


def centre_crop(image: PILImage, image_size: int, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 (image_size, image_size, 3): the image resized and cut as evaluation does it."""
    from PIL import Image

    wants = preprocessing
    if is_long(image.width, image.height):
        image = Image.fromarray(middle(np.asarray(image)))
    width, height = np.array([image.width]), np.array([image.height])
    size, start = eval_geometry(width, height, image_size, wants.crop_ratio, wants.squash)
    (high, wide), (top, left) = size[0].tolist(), start[0].tolist()
    resized = image.resize((wide, high), Image.Resampling[wants.interpolation.upper()])
    return np.asarray(resized.crop((left, top, left + image_size, top + image_size)))


def batches(
    sources: Sequence[Any], image_size: int, preprocessing: Preprocessing, batch: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
    """Images in order, prepared ahead in threads: (indices of the images, uint8 (m, S, S, 3), [(index, why not)]).

    An image that cannot be read is left out of the batch and named in the third item. Tensors are on the CPU, or on the
    GPU where DALI decodes there.
    """
    paths = all(isinstance(s, (str, os.PathLike)) and not is_url(s) for s in sources)
    if device.type == "cuda" and paths and len(sources) >= DALI_FROM:
        yield from _dali_batches(sources, image_size, preprocessing, batch, device)
        return

    def prepare(i: int) -> np.ndarray | str:
        try:
            return centre_crop(open_image(sources[i], name_of(sources[i], i)), image_size, preprocessing)
        except DeitfastError as error:
            return str(error)

    chunks = [range(len(sources))[start : start + batch] for start in range(0, len(sources), batch)]
    with ThreadPoolExecutor(thread_count(0), thread_name_prefix="deitfast-read") as pool:
        made = pool.map(prepare, next(iter(chunks), ()))
        for chunk, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
            results, made = made, pool.map(prepare, following)  # the next batch is made meanwhile
            pairs = list(zip(chunk, results, strict=True))
            good = [(i, image) for i, image in pairs if not isinstance(image, str)]
            stacked = np.stack([image for _, image in good]) if good else np.zeros((0, image_size, image_size, 3), "u1")
            bad = [(i, reason) for i, reason in pairs if isinstance(reason, str)]
            yield [i for i, _ in good], torch.from_numpy(stacked), bad


def _dali_batches(
    sources: Sequence[Any], image_size: int, preprocessing: Preprocessing, batch: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, list[tuple[int, str]]]]:
    """The same through the evaluation loader, whose labels are the images' numbers here."""
    entries, bad = [], []
    for i, source in enumerate(sources):
        try:
            path = os.path.abspath(os.path.expanduser(os.fspath(source)))
            data = Path(path).read_bytes()
            entries.append((i, path, inspect_image(data, whole=False)))
        except (OSError, ValueError) as error:
            bad.append((i, f"{source} cannot be read: {getattr(error, 'strerror', None) or error}"))
    n = len(entries)
    manifest = Manifest(
        root="/",
        files=strings([path for _, path, _ in entries]),
        file_id=np.arange(n),
        member=strings([""] * n),
        offset=np.zeros(n, np.int64),
        label=np.array([i for i, *_ in entries], np.int64),
        classes=(),
        **columns(np.array([facts for *_, facts in entries], FACTS)),
    )
    loader = EvalLoader(
        manifest, image_size, preprocessing.crop_ratio, batch, squash=preprocessing.squash,
        interpolation=preprocessing.interpolation, device=device, say=lambda _: None, bad_limit=1.0,
    )  # fmt: skip
    for images, numbers in loader:
        yield numbers.tolist(), images, bad
        bad = []
    index = {path.lstrip("/"): i for i, path, *_ in entries}
    bad += [(index[name.lstrip("/")], reason) for name, reason in loader.quarantined]
    if bad:
        yield [], torch.zeros((0, image_size, image_size, 3), dtype=torch.uint8), bad
