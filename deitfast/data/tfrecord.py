"""TFRecord files of ImageNet's layout, indexed in place: no TensorFlow, nothing is copied or unpacked.

A file is a sequence of records, each `length (8 bytes), crc of length, data, crc of data`, little-endian, with masked
CRC-32C. The data is a tf.train.Example: a protobuf map of features. Read are `image/encoded`, `image/class/label`,
`image/class/synset` and `image/filename`; an index file is not needed. Sources: TensorFlow's
`core/lib/io/record_writer.h` and `core/example/example.proto`.

A record whose checksum fails is reported as a damaged image. A file whose framing is broken cannot be read on, so it is
an error.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from deitfast.errors import DeitfastError

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_LANES = 1024
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types

Span = tuple[int, int]
"""First byte and end of a stretch of a file."""


@dataclass(frozen=True)
class Record:
    """One example. offset, length: of the encoded image in the file; the rest as found, label None where absent."""

    number: int
    offset: int
    length: int
    label: int | None
    synset: str
    filename: str


def is_tfrecord(path: Path) -> bool:
    """Whether the file begins with a whole record header: 8 bytes of length and their checksum."""
    try:
        with open(path, "rb") as f:
            head = f.read(12)
    except OSError:
        return False
    return len(head) == 12 and _masked(crc32c(head[:8])) == struct.unpack("<I", head[8:])[0]


def read_records(path: Path) -> tuple[list[Record], list[tuple[str, str]]]:
    """The examples of a file, and (name, reason) of those that are damaged or hold no image.

    Raises DeitfastError where the framing is broken.
    """
    records: list[Record] = []
    bad: list[tuple[str, str]] = []
    with open(path, "rb") as f:
        if not f.seek(0, 2):
            return records, bad
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for number, (start, end, whole) in enumerate(_frames(data, path)):
                try:
                    if not whole:
                        raise ValueError("its checksum is wrong")
                    records.append(_example(data, start, end, number))
                except ValueError as error:
                    bad.append((f"record {number}", str(error)))
    return records, bad


def _frames(data: mmap.mmap, path: Path) -> Iterator[tuple[int, int, bool]]:
    """First byte and end of each record's data, and whether its checksum is right."""
    at, size, number = 0, len(data), 0
    while at < size:
        head = data[at : at + 12]
        if len(head) < 12 or _masked(crc32c(head[:8])) != struct.unpack("<I", head[8:])[0]:
            raise DeitfastError(f"{path} is damaged at byte {at}, in the header of record {number}. Fetch it again")
        (length,) = struct.unpack("<Q", head[:8])
        start, end = at + 12, at + 12 + length
        if end + 4 > size:
            raise DeitfastError(f"{path} is truncated in record {number}: {size} bytes, {end + 4} needed")
        yield start, end, _masked(crc32c(data[start:end])) == struct.unpack("<I", data[end : end + 4])[0]
        at, number = end + 4, number + 1


def _example(data: mmap.mmap, start: int, end: int, number: int) -> Record:
    """What a tf.train.Example holds. Raises ValueError for anything else."""
    features: dict[bytes, Span] = {}
    for field, value in _fields(data, start, end):  # Example
        if field != 1 or isinstance(value, int):
            continue
        for inner, entry in _fields(data, *value):  # Features: map entries
            if inner == 1 and not isinstance(entry, int):
                pair = {k: v for k, v in _fields(data, *entry) if not isinstance(v, int)}
                if 1 in pair and 2 in pair:
                    features[data[slice(*pair[1])]] = pair[2]
    image = _first_bytes(data, features.get(b"image/encoded"))
    if image is None:
        raise ValueError("no feature image/encoded")
    label = _first_integer(data, features.get(b"image/class/label"))
    texts = [_first_bytes(data, features.get(key)) for key in (b"image/class/synset", b"image/filename")]
    synset, filename = (data[slice(*span)].decode("utf-8", "replace") if span else "" for span in texts)
    return Record(number, image[0], image[1] - image[0], label, synset, filename)


def _first_bytes(data: mmap.mmap, feature: Span | None) -> Span | None:
    """Where the first value of a Feature's bytes list (field 1) lies."""
    for field, values in _fields(data, *feature) if feature else ():
        if field == 1 and not isinstance(values, int):
            return next((v for f, v in _fields(data, *values) if f == 1 and not isinstance(v, int)), None)
    return None


def _first_integer(data: mmap.mmap, feature: Span | None) -> int | None:
    """The first value of a Feature's int64 list (field 3), packed or not."""
    for field, values in _fields(data, *feature) if feature else ():
        if field == 3 and not isinstance(values, int):
            for f, value in _fields(data, *values):
                if f == 1:
                    number = value if isinstance(value, int) else _varint(data, *value)[0]
                    return number - (1 << 64) if number >> 63 else number
    return None


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | Span]]:
    """(field number, integer or span of bytes) of a protobuf message. Raises ValueError if it is malformed."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("not a tf.train.Example")
        if length > end - at:
            raise ValueError("not a tf.train.Example: a field is longer than its message")
        if kind == _BYTES:
            yield key >> 3, (at, at + length)
        at += length


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A base-128 integer of at most 64 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("not a tf.train.Example: a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("not a tf.train.Example: a number is too long")


def _masked(crc: int) -> int:
    """TFRecord's masking of a CRC."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C. Long data is cut into lanes whose CRCs are computed side by side, then joined two by two."""
    length = len(data) // _LANES
    if length < 8:
        return _crc_bytes(data, 0xFFFFFFFF) ^ 0xFFFFFFFF
    table = _table()
    columns = np.frombuffer(data, np.uint8, length * _LANES).reshape(_LANES, length).T.copy()
    crc: np.ndarray = np.zeros(_LANES, np.uint32)
    crc[0] = 0xFFFFFFFF
    for column in columns:
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    step = length
    while len(crc) > 1:
        # The CRC of AB (started with A's register) is A's register after as many zero bytes as B has, xor B's.
        crc = _after_zeros(crc[::2], step) ^ crc[1::2]
        step *= 2
    return _crc_bytes(data[length * _LANES :], int(crc[0])) ^ 0xFFFFFFFF


def _crc_bytes(data: bytes, crc: int) -> int:
    table = _table().tolist() if len(data) > 64 else _table()
    for byte in data:
        crc = int(table[(crc ^ byte) & 0xFF]) ^ crc >> 8
    return crc


def _after_zeros(crc: np.ndarray, count: int) -> np.ndarray:
    """Registers uint32 (n,) after `count` zero bytes: a linear map, applied byte by byte."""
    tables = _zeros_tables(count)
    parts = [tables[k][crc >> np.uint32(8 * k) & np.uint32(0xFF)] for k in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


@lru_cache(maxsize=4096)
def _zeros_tables(count: int) -> np.ndarray:
    """What `count` zero bytes make of each value of each of the register's four bytes: uint32 (4, 256)."""
    tables, value = np.zeros((4, 256), np.uint32), np.arange(256, dtype=np.uint32)
    for bit, image in enumerate(_zeros_map(count)):
        tables[bit // 8] ^= (value >> np.uint32(bit % 8) & np.uint32(1)) * np.uint32(image)
    return tables


@lru_cache(maxsize=4096)
def _zeros_map(count: int) -> tuple[int, ...]:
    """What `count` zero bytes make of each of the register's 32 bits, by squaring."""
    if count == 1:
        table = _table()
        return tuple(int(table[(1 << bit) & 0xFF]) ^ (1 << bit) >> 8 for bit in range(32))
    half = _zeros_map(count // 2)
    double = tuple(_apply(half, value) for value in half)
    return tuple(_apply(_zeros_map(1), value) for value in double) if count % 2 else double


def _apply(images: tuple[int, ...], value: int) -> int:
    result = 0
    for bit, image in enumerate(images):
        if value >> bit & 1:
            result ^= image
    return result


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """CRC of each single byte: uint32 (256,)."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table
