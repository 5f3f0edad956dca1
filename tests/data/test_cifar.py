"""CIFAR-10 from its authors' archives: the pixels and labels that went in come out, and nothing else gets in."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from deitfast.data import open_dataset
from deitfast.data.cifar import CLASSES
from deitfast.errors import DeitfastError

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batches(each: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Planes of red, green and blue (n, 3072) and labels, by the batch's name."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (each, 3072), dtype=np.uint8), [(3 * b + i) % 10 for i in range(each)])
        for b, name in enumerate(NAMES)
    }


def pickled(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"batch_label": b"some", b"labels": labels, b"data": pixels}, protocol=2)


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tobytes()


def write(root: Path, form: str, packed: bool, content: dict[str, tuple[np.ndarray, list[int]]]) -> None:
    """The authors' archive in `root`, or what it unpacks to."""
    encode, folder, suffix = {
        "python": (pickled, "cifar-10-batches-py", ""), "binary": (binary, "cifar-10-batches-bin", ".bin"),
    }[form]  # fmt: skip
    files = {f"{folder}/{name}{suffix}": encode(*batch) for name, batch in content.items()}
    if packed:
        with tarfile.open(root / f"cifar-10-{form}.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        (root / folder).mkdir()
        for name, data in files.items():
            (root / name).write_bytes(data)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_image_comes_out_with_its_label(form: str, packed: bool, tmp_path: Path) -> None:
    content = batches()
    write(tmp_path, form, packed, content)
    data = open_dataset(str(tmp_path), quiet=True)
    assert data.classes == CLASSES
    for split, names in ((data.train, NAMES[:5]), (data.val, NAMES[5:])):
        assert split is not None
        expected = sorted(
            (label, row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes())
            for name in names
            for row, label in zip(*content[name], strict=True)
        )
        assert sorted((int(split.label[i]), split.rgb(i).tobytes()) for i in range(len(split))) == expected


def test_the_archive_itself_may_be_given_and_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "python", True, batches())
    archive = str(tmp_path / "cifar-10-python.tar.gz")
    first = open_dataset(archive, quiet=True).train
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the archive was read again"))
    second = open_dataset(archive, quiet=True).train
    assert first is not None
    assert second is not None
    assert np.array_equal(first.checksum, second.checksum)


def test_class_folders_beside_an_archive_are_what_is_meant(make_folder, tmp_path: Path) -> None:
    write(make_folder(), "python", True, batches())
    assert open_dataset(str(tmp_path / "set"), quiet=True).classes == ("ape", "bat", "cow")


class Evil:
    def __reduce__(self):
        return print, ("a pickle ran",)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (pickle.dumps({b"data": Evil(), b"labels": [0]}), "asks for builtins.print"),
        (pickled(np.zeros((2, 3071), np.uint8), [0, 1]), r"holds uint8 \(2, 3071\)"),
        (pickled(np.zeros((2, 3072), np.uint8), [0]), r"holds uint8 \(2, 3072\)"),
        (pickled(np.zeros((2, 3072), np.uint8), [0, 10]), "labels beyond the 10 classes"),
        (b"no pickle", "is not a batch of CIFAR-10"),
        (b"", "is not a batch of CIFAR-10"),
    ],
)
def test_a_batch_that_is_none_is_refused_in_one_line(data: bytes, told: str, tmp_path: Path, capsys) -> None:
    write(tmp_path, "python", False, batches())
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(data)
    with pytest.raises(DeitfastError, match=f"data_batch_3 of .*{told}") as error:
        open_dataset(str(tmp_path), quiet=True)
    assert "\n" not in str(error.value)
    assert "a pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_that_is_missing_is_named(packed: bool, tmp_path: Path) -> None:
    content = batches()
    del content["test_batch"]
    write(tmp_path, "python", packed, content)
    with pytest.raises(DeitfastError, match="test_batch"):
        open_dataset(str(tmp_path), quiet=True)
