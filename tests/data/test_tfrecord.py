"""TFRecord files: the checksum against published values, the reader against DALI's, and damage of every kind."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitfast.data import open_dataset
from deitfast.data.tfrecord import crc32c, read_records
from deitfast.errors import DeitfastError
from tests.data.conftest import picture


def varint(value: int) -> bytes:
    out = bytearray()
    value &= 0xFFFFFFFFFFFFFFFF
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(packed: bool = True, **features: bytes | int) -> bytes:
    """A tf.train.Example; keys with __ for /."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            feature = field(3, field(1, varint(value)) if packed else varint(1 << 3) + varint(value))
        entries += field(1, field(1, key.replace("__", "/").encode()) + field(2, feature))
    return field(1, entries)


def bitwise_crc(data: bytes) -> int:
    """CRC-32C from its definition, one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = bitwise_crc(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(40 + seed, 44, seed).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def imagenet_like(root: Path, labels: list[int], name: str = "train", **more: bytes) -> Path:
    """Two files of ImageNet's layout with one image a label; returns the first."""
    root.mkdir(exist_ok=True)
    records = [
        record(example(image__encoded=jpeg(i), image__class__label=label, image__height=44, **more))
        for i, label in enumerate(labels)
    ]
    half = len(records) // 2
    for number, part in enumerate((records[:half], records[half:])):
        (root / f"{name}-{number:05d}-of-00002").write_bytes(b"".join(part))
    return root / f"{name}-00000-of-00002"


def test_the_checksum_is_crc32c():
    # RFC 3720, B.4
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    rng = np.random.default_rng(0)
    for length in (0, 1, 8191, 8192, 8193, 20_011):
        data = rng.bytes(length)
        assert crc32c(data) == bitwise_crc(data)


def test_records_are_those_that_dali_reads(tmp_path):
    from nvidia.dali import fn, tfrecord
    from nvidia.dali.pipeline import Pipeline

    first = imagenet_like(tmp_path / "set", [3, 1, 2, 3, 1, 2])
    index, at = [], 0
    data = first.read_bytes()
    while at < len(data):
        size = 16 + struct.unpack("<Q", data[at : at + 8])[0]
        index.append(f"{at} {size}\n")
        at += size
    (tmp_path / "index").write_text("".join(index))
    pipeline = Pipeline(batch_size=3, num_threads=1, device_id=None)
    features = {
        "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
        "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
    }
    with pipeline:
        read = fn.readers.tfrecord(path=str(first), index_path=str(tmp_path / "index"), features=features)
        pipeline.set_outputs(read["image/encoded"], read["image/class/label"])
    images, labels = pipeline.run()
    manifest = open_dataset(str(tmp_path / "set"), split="train").train
    for i in range(3):
        assert manifest.read(i).tobytes() == np.array(images.at(i)).tobytes()
        assert manifest.classes[manifest.label[i]] == str(labels.at(i)[0])
    assert manifest.name(0) == "train-00000-of-00002/000000"


def test_labels_by_number_by_synset_and_by_list(tmp_path):
    imagenet_like(tmp_path / "one", [1, 2, 3, 1])
    imagenet_like(tmp_path / "one", [2, 2], "validation")
    data = open_dataset(str(tmp_path / "one"))
    assert data.classes == ("1", "2", "3")
    assert data.train.label.tolist() == [0, 1, 2, 0]
    assert data.val.label.tolist() == [1, 1]  # although neither the first nor the last class is there

    imagenet_like(tmp_path / "zero", [0, 2, 1, 0])
    imagenet_like(tmp_path / "zero", [1, 2], "val")
    data = open_dataset(str(tmp_path / "zero"))
    assert data.classes == ("0", "1", "2")
    assert data.val.label.tolist() == [1, 2]

    root = tmp_path / "synsets"
    root.mkdir()
    wnids = ("n02102040", "n01440764")
    (root / "train.tfrecord").write_bytes(
        b"".join(
            record(
                example(
                    packed=False,
                    image__encoded=jpeg(i),
                    image__class__label=99,
                    image__class__synset=wnid.encode(),
                    image__filename=f"{wnid}_{i}.JPEG".encode(),
                )
            )
            for i, wnid in enumerate(wnids)
        )
    )
    data = open_dataset(str(root))
    assert data.classes == ("n01440764", "n02102040")
    assert data.train.label.tolist() == [1, 0]
    assert data.train.name(1) == "train.tfrecord/000001_n01440764_1.JPEG"
    assert open_dataset(str(root), "train", classes="imagenet").train.label.tolist() == [217, 0]

    (tmp_path / "one" / "classes.txt").write_text("ape\nbat\ncow\n")
    data = open_dataset(str(tmp_path / "one"), "train")
    assert data.train.classes == ("ape", "bat", "cow")
    assert data.train.label.tolist() == [0, 1, 2, 0]
    with pytest.raises(DeitfastError, match="may count the 3 classes from 0 or from 1"):
        open_dataset(str(tmp_path / "one"))  # val has the label 2 alone
    (tmp_path / "one" / "classes.txt").write_text("ape\nbat\n")
    with pytest.raises(DeitfastError, match=r"labels 1 to 3 in .* do not fit the 2 known classes"):
        open_dataset(str(tmp_path / "one"), "train")


def test_damage_is_named(tmp_path):
    root = tmp_path / "set"
    first = imagenet_like(root, [1, 2, 1, 2, 1, 2])
    whole = first.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    changed = bytearray(whole)
    changed[length // 2] ^= 1  # inside the first record
    first.write_bytes(bytes(changed) + record(b"no example") + record(example(image__class__label=1)))
    data = open_dataset(str(root), "train")
    assert len(data.train) == 5
    assert dict(data.train.bad) == {
        "train-00000-of-00002/record 0": "its checksum is wrong",
        "train-00000-of-00002/record 3": "not a tf.train.Example",
        "train-00000-of-00002/record 4": "no feature image/encoded",
    }

    first.write_bytes(whole[:-10])
    with pytest.raises(DeitfastError, match="is truncated in record 2"):
        open_dataset(str(root), "train")
    first.write_bytes(whole[: length + 16] + b"x" * 40)
    with pytest.raises(DeitfastError, match=f"is damaged at byte {length + 16}, in the header of record 1"):
        open_dataset(str(root), "train")
    first.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(DeitfastError, match="is not an uncompressed TFRecord file"):
        open_dataset(str(root), "train")
    first.write_bytes(record(example(image__encoded=jpeg(1))))
    with pytest.raises(DeitfastError, match="has no image/class/label"):
        open_dataset(str(root), "train")


def test_any_bytes_are_read_or_refused(tmp_path):
    """2,000 mutations of a record with right checksums: a record, a named damage or a DeitfastError, nothing else."""
    rng = random.Random(0)
    image = io.BytesIO()
    Image.new("RGB", (1, 1)).save(image, "BMP")
    whole = example(image__encoded=image.getvalue(), image__class__label=-3, image__filename=b"x")
    path = tmp_path / "mutated"
    for _ in range(200):
        parts = []
        for _ in range(10):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            parts.append(record(bytes(data[: rng.randint(1, len(data))])))
        path.write_bytes(b"".join(parts))
        records, bad = read_records(path)
        assert len(records) + len(bad) == 10
        size = path.stat().st_size
        assert all(0 <= r.offset <= r.offset + r.length <= size for r in records)
