"""What a weight file must be before its tensors are used: not larger than it looks, whole, of plain finite numbers."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deitfast.errors import DeitfastError

HASH = "sha256"
"""Key of `content_hash` in the metadata of weights that deitfast wrote."""

MOST_BLOCKS = 1000
MOST_TENSORS = 40 * MOST_BLOCKS
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_archive(path: Path) -> None:
    """DeitfastError for a PyTorch file that unpacks to more than it is: torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return  # of the time before zip; its bytes are what it holds
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch says what is wrong with it
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise DeitfastError(
            f"{path} is not loaded: it would unpack to more than its {path.stat().st_size:,} bytes, which torch.save "
            "never writes. Save it again with torch.save"
        )


def check_count(path: Path, count: int) -> None:
    """DeitfastError for more tensors than any model of ours could have."""
    if count > MOST_TENSORS:
        raise DeitfastError(f"{path} holds {count:,} tensors, no vision transformer has more than {MOST_TENSORS:,}")


def check_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """DeitfastError for a tensor without plain values: sparse, quantised, nested, or on the meta device."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            kind = "without values" if tensor.is_meta else "quantised" if tensor.is_quantized else "sparse or nested"
            raise DeitfastError(f"{path}: tensor {name} is {kind}. Save plain dense tensors")


def check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """DeitfastError for weights that are no finite floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise DeitfastError(f"{path}: {name} is {tensor.dtype}, weights must be floating-point numbers")
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise DeitfastError(
                f"{path}: {bad:,} of the {tensor.numel():,} numbers of {name} are NaN or infinite. Use an earlier file"
            )


def check_hash(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """DeitfastError where the file states a hash of its content and holds another one."""
    if HASH in metadata and metadata[HASH] != content_hash(tensors, metadata):
        raise DeitfastError(f"{path} is damaged: its content is not what was written (sha256 mismatch). Copy it again")


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of the metadata and of every tensor's name, dtype, shape and bytes, whatever their order in a file."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != HASH}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
