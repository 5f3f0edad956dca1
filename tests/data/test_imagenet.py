"""ImageNet as people have it: the official tars, Kaggle's folders, Hugging Face's parquet shards, a flat val/."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitfast.cli.main import main
from deitfast.data import open_dataset
from deitfast.errors import DeitfastError

SYNSETS = ("n01440764", "n01443537", "n02119789")
OF_VAL = (2, 0, 1, 1, 2)  # class of each validation image
_IDS = {"n02119789": 1, "n01440764": 2, "n01443537": 3}  # ILSVRC2012_ID: not in the order of the synsets


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path_factory.mktemp("home")))


def jpeg(label: int, seed: int) -> bytes:
    """An image whose colour tells its class."""
    noise = np.random.default_rng(seed).integers(0, 40, (24, 32, 3))
    buffer = io.BytesIO()
    Image.fromarray((noise + 80 * label).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


TRAIN = {f"{s}_{i}.JPEG": (s, jpeg(label, 10 * label + i)) for label, s in enumerate(SYNSETS) for i in range(3)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(label, 100 + i) for i, label in enumerate(OF_VAL, 1)}


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def devkit() -> dict[str, bytes]:
    """As the devkit has it: numbers of its own, and a MATLAB file that says which synsets they are."""
    savemat = pytest.importorskip("scipy.io").savemat
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, synset, "a word", 0) for synset, number in _IDS.items()] + [(1001, "n00001740", "entity", 3)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    truth = "".join(f"{_IDS[SYNSETS[label]]}\n" for label in OF_VAL).encode()
    folder = "ILSVRC2012_devkit_t12/data/"
    return {f"{folder}ILSVRC2012_validation_ground_truth.txt": truth, f"{folder}meta.mat": buffer.getvalue()}


def official_train(root: Path) -> None:
    inner = {s: {name: data for name, (synset, data) in TRAIN.items() if synset == s} for s in SYNSETS}
    outer = tar_bytes({f"{s}.tar": tar_bytes(files) for s, files in inner.items()})
    (root / "ILSVRC2012_img_train.tar").write_bytes(outer)


def official(root: Path) -> None:
    official_train(root)
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(VAL))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(devkit(), "w:gz"))


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def unpacked(root: Path) -> None:
    write(root, {f"train/{synset}/{name}": data for name, (synset, data) in TRAIN.items()})
    write(root, {f"val/{name}": data for name, data in VAL.items()})
    write(root, devkit())


def kaggle(root: Path) -> None:
    folder = root / "ILSVRC/Data/CLS-LOC"
    write(folder, {f"train/{synset}/{name}": data for name, (synset, data) in TRAIN.items()})
    write(folder, {f"val/{name}": data for name, data in VAL.items()})
    write(folder, {"test/ILSVRC2012_test_00000001.JPEG": jpeg(0, 0)})
    rows = [f"{name[:-5]},{SYNSETS[label]} 1 2 30 40 " for name, label in zip(VAL, OF_VAL, strict=True)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")


def synset_labels(root: Path) -> None:
    official_train(root)
    write(root, {f"val/{name}": data for name, data in VAL.items()})
    text = "".join(f"{SYNSETS[label]}\n" for label in OF_VAL)
    (root / "imagenet_2012_validation_synset_labels.txt").write_text(text)


def parquet(root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    (root / "data").mkdir()
    label_of = {s: i for i, s in enumerate(SYNSETS)}
    train = [({"bytes": data, "path": name}, label_of[s]) for name, (s, data) in TRAIN.items()]
    val = [
        ({"bytes": data, "path": f"{name[:-5]}_{SYNSETS[label]}.JPEG"}, label)
        for (name, data), label in zip(VAL.items(), OF_VAL, strict=True)
    ]
    features = {"image": {"_type": "Image"}, "label": {"names": list(SYNSETS), "_type": "ClassLabel"}}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    shards = {"train-00000-of-00002": train[:5], "train-00001-of-00002": train[5:], "validation-00000-of-00001": val}
    for name, rows in shards.items():
        image = pa.array([r[0] for r in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        table = pa.table({"image": image, "label": pa.array([r[1] for r in rows], pa.int64())})
        write_table(table.replace_schema_metadata(told), root / f"data/{name}.parquet", row_group_size=2)


FORMS: dict[str, Callable[[Path], None]] = {
    "official tars": official,
    "unpacked, flat val": unpacked,
    "Kaggle": kaggle,
    "synset labels": synset_labels,
    "parquet": parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_labels(form, tmp_path):
    FORMS[form](tmp_path)
    data = open_dataset(str(tmp_path), quiet=True)
    assert data.classes == SYNSETS
    for split, expected in (
        (data.train, sorted((SYNSETS.index(s), d) for s, d in TRAIN.values())),
        (data.val, sorted(zip(OF_VAL, VAL.values(), strict=True))),
    ):
        assert split is not None
        assert not split.bad
        assert sorted((int(split.label[i]), split.read(i).tobytes()) for i in range(len(split))) == expected


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_prepared_resumed_and_verified(form, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    FORMS[form](source)
    command = ["data", "prepare", str(source), str(out), "--per-shard", "4", "--workers", "1"]
    main(command)
    assert "14 images in 5 shards" in capsys.readouterr().out
    (out / "train-00001.tar").unlink()
    (out / "train.manifest.npz").unlink()
    main(command)
    assert "all read back with the right checksums" in capsys.readouterr().out
    data = open_dataset(str(out), quiet=True)
    assert data.classes == SYNSETS
    found = sorted((int(data.val.label[i]), data.val.read(i).tobytes()) for i in range(len(data.val)))
    assert found == sorted(zip(OF_VAL, VAL.values(), strict=True))


def test_validation_images_without_labels_name_what_has_them(tmp_path):
    official_train(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(VAL))
    with pytest.raises(DeitfastError, match=r"Put ILSVRC2012_devkit_t12.tar.gz .* or Kaggle's LOC_val_solution.csv"):
        open_dataset(str(tmp_path))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
    )
    with pytest.raises(DeitfastError, match="says nothing of ILSVRC2012_val_00000002"):
        open_dataset(str(tmp_path))
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"\x1f\x8bnot whole")
    with pytest.raises(DeitfastError, match="holds no labels that can be read"):
        open_dataset(str(tmp_path))


def test_a_truncated_official_tar_is_named(tmp_path):
    official_train(tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DeitfastError, match=r"is not a whole tar of tars .* Download it again"):
        open_dataset(str(tmp_path), split="train")


def test_parquet_of_another_kind_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pa.table({"text": ["a"]}), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DeitfastError, match="has no column image; it has text"):
        open_dataset(str(tmp_path), split="train")
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DeitfastError, match="cannot be read as parquet"):
        open_dataset(str(tmp_path), split="train")
