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
_NOTHING: Span = (0, 0)


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
    return _holds(head[:8], head[8:])


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
        if not _holds(head[:8], head[8:]):
            raise DeitfastError(f"{path} is damaged at byte {at}, in the header of record {number}. Fetch it again")
        (length,) = struct.unpack("<Q", head[:8])
        start, end = at + 12, at + 12 + length
        if end + 4 > size:
            raise DeitfastError(f"{path} is truncated in record {number}: {size} bytes, {end + 4} needed")
        yield start, end, _holds(data[start:end], data[end : end + 4])
        at, number = end + 4, number + 1


def _example(data: mmap.mmap, start: int, end: int, number: int) -> Record:
    """What a tf.train.Example holds. Raises ValueError for anything else."""
    features: dict[bytes, Span] = {}
    for maps in _spans(data, (start, end), 1):  # Example: Features
        for entry in _spans(data, maps, 1):
            pair = {field: value for field, value in _fields(data, entry) if not isinstance(value, int)}
            if 1 in pair and 2 in pair:
                features[data[slice(*pair[1])]] = pair[2]
    image = _first_bytes(data, features.get(b"image/encoded", _NOTHING))
    if image is None:
        raise ValueError("no feature image/encoded")
    label = _first_integer(data, features.get(b"image/class/label", _NOTHING))
    texts = [_first_bytes(data, features.get(key, _NOTHING)) for key in (b"image/class/synset", b"image/filename")]
    synset, filename = (data[slice(*span)].decode("utf-8", "replace") if span else "" for span in texts)
    return Record(number, image[0], image[1] - image[0], label, synset, filename)


def _first_bytes(data: mmap.mmap, feature: Span) -> Span | None:
    """Where the first value of a Feature's bytes list (field 1) lies."""
    return next((value for values in _spans(data, feature, 1) for value in _spans(data, values, 1)), None)


def _first_integer(data: mmap.mmap, feature: Span) -> int | None:
    """The first value of a Feature's int64 list (field 3), packed or not."""
    for values in _spans(data, feature, 3):
        for field, value in _fields(data, values):
            if field == 1:
                number = value if isinstance(value, int) else _varint(data, *value)[0]
                return number - (1 << 64) if number >> 63 else number
    return None


def _spans(data: mmap.mmap, message: Span, number: int) -> Iterator[Span]:
    """Where the fields of that number lie, of those that hold bytes or a message."""
    return (value for field, value in _fields(data, message) if field == number and not isinstance(value, int))


def _fields(data: mmap.mmap, message: Span) -> Iterator[tuple[int, int | Span]]:
    """(field number, integer or span of bytes) of a protobuf message. Raises ValueError if it is malformed."""
    at, end = message
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


def _holds(data: bytes, masked: bytes) -> bool:
    """Whether the data has this checksum: four bytes, as TFRecord masks them."""
    crc = crc32c(data)
    return masked == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC-32C. Long data is cut into lanes whose CRCs are computed side by side, then joined two by two."""
    length = len(data) // _LANES
    if length < 8:
        return _crc_bytes(data, 0xFFFFFFFF) ^ 0xFFFFFFFF
    columns = np.frombuffer(data, np.uint8, length * _LANES).reshape(_LANES, length).T.copy()
    crc: np.ndarray = np.zeros(_LANES, np.uint32)
    crc[0] = 0xFFFFFFFF
    for column in columns:
        crc = _next(crc, column)
    while len(crc) > 1:
        # The CRC of AB (started with A's register) is A's register after as many zero bytes as B has, xor B's.
        crc = _mapped(crc[::2], _zeros(length)) ^ crc[1::2]
        length *= 2
    return _crc_bytes(data[length:], int(crc[0])) ^ 0xFFFFFFFF


def _crc_bytes(data: bytes, crc: int) -> int:
    table = _table().tolist() if len(data) > 64 else _table()
    for byte in data:
        crc = int(table[(crc ^ byte) & 0xFF]) ^ crc >> 8
    return crc


def _next(crc: np.ndarray, byte: np.ndarray | int) -> np.ndarray:
    """Registers, uint32, after one more byte each."""
    return _table()[(crc ^ byte) & 0xFF] ^ crc >> 8


@lru_cache(maxsize=4096)
def _zeros(count: int) -> np.ndarray:
    """What `count` zero bytes make of each value of each of the register's four bytes: uint32 (4, 256)."""
    if count == 0:
        return np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    half = _zeros(count // 2)
    twice = _mapped(half, half)
    return _next(twice, 0) if count % 2 else twice


def _mapped(crc: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Registers after the zero bytes that `tables` stands for: a linear map, applied byte by byte."""
    parts = [tables[k][crc >> np.uint32(8 * k) & np.uint32(0xFF)] for k in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """CRC of each single byte: uint32 (256,)."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table
