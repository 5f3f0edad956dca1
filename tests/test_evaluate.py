"""Evaluation against plain counting, at several world sizes, with everything behind the scores."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deitfast.cli.main import main
from deitfast.data import EvalLoader, Manifest, normalise, open_dataset
from deitfast.distributed import World
from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT
from deitfast.model.factory import create_model
from deitfast.use.evaluate import Details, Scores, evaluate_each, evaluate_in_detail, real_labels
from tests.processes import in_processes

ALONE = World(0, 1, 0, torch.device("cpu"))
OPTIONS = {"crop_ratio": 0.875, "batch": 32, "workers": 1, "bf16": False}


def evaluate(model: DeiT, data: Manifest, **options: Any) -> Scores:
    (scores,) = evaluate_each(model, [contextlib.nullcontext], data, ALONE, **OPTIONS, **options)
    return scores


def digits() -> Manifest:
    data = open_dataset("digits", split="val", quiet=True).val
    assert data is not None
    return data.spread(101)  # some of every class


def model_of(distilled: bool) -> DeiT:
    """A random model whose answers differ between images and heads."""
    torch.manual_seed(0)
    model = DeiT(
        width=64, depth=1, num_heads=2, image_size=16, patch_size=4, num_classes=10, distilled=distilled
    ).train()
    for name, linear in model.heads():
        torch.nn.init.normal_(linear.weight, std=0.5 if name == "head" else 0.3)
    return model


def everything(model: DeiT, data: Manifest) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of the answer and of each head, and labels, one image at a time."""
    rows, labels = [], []
    model = model.eval()
    with torch.no_grad():
        for image, label in EvalLoader(data, image_size=16, batch=1):
            features = model.forward_features(normalise(image))
            heads = [linear(features[:, i]) for i, (_, linear) in enumerate(model.heads())]
            rows.append([model(normalise(image)), *heads])
            labels.append(label)
    return [torch.cat(column).double() for column in zip(*rows, strict=True)], torch.cat(labels)


def test_several_weights_are_scored_as_each_alone_from_one_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of(distilled=False), digits()
    other = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @contextlib.contextmanager
    def replaced() -> Iterator[None]:
        model.load_state_dict(other)
        yield
        model.load_state_dict(own)

    expected = [evaluate(model, data)]
    with replaced():
        expected.append(evaluate(model, data))
    assert expected[0].loss != expected[1].loss
    read: list[int] = []
    original = Manifest.encoded
    monkeypatch.setattr(Manifest, "encoded", lambda self, i, **how: (read.append(i), original(self, i, **how))[1])
    assert evaluate_each(model, [contextlib.nullcontext, replaced], data, ALONE, **OPTIONS) == expected
    assert sorted(read) == list(range(101))
    assert model.training


@pytest.mark.parametrize("distilled", [False, True])
def test_scores_and_details_are_those_of_plain_counting(distilled: bool) -> None:
    model, data = model_of(distilled), digits()
    rng = np.random.default_rng(0)
    real = [sorted(rng.choice(10, rng.integers(0, 3), replace=False).tolist()) for _ in range(len(data))]
    scores, details = evaluate_in_detail(model, data, ALONE, real=real, **OPTIONS)
    assert model.training
    (logits, *heads), labels = everything(model, data)
    answer, probabilities = logits.argmax(1), logits.softmax(1)
    n = len(labels)
    assert scores.images == n == 101
    assert scores.top1 == pytest.approx(100 * (answer == labels).sum().item() / n)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert scores.top5 == pytest.approx(100 * (ranks < 5).sum().item() / n)
    assert scores.loss == pytest.approx(-probabilities.gather(1, labels[:, None]).log().mean().item(), rel=1e-5)
    if distilled:
        expected = [100 * (head.argmax(1) == labels).sum().item() / n for head in heads]
        assert [scores.top1_head, scores.top1_dist] == pytest.approx(expected)
        assert scores.top1_head != scores.top1_dist
    else:
        assert scores.top1_head is scores.top1_dist is None
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for label, found in zip(labels.tolist(), answer.tolist(), strict=True):
        confusion[label, found] += 1
    assert torch.equal(details.confusion, confusion)
    for c in range(10):
        share = 100 * (answer[labels == c] == c).double().mean().item()
        assert details.per_class[c].item() == pytest.approx(share)
    confidence = probabilities.max(1).values
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            right = (answer == labels)[inside].double().mean()
            error += inside.sum().item() / n * abs(right - confidence[inside].mean()).item()
    assert details.ece == pytest.approx(error, abs=1e-6)
    assert details.bins[:, 0].sum() == n
    with_label = [i for i in range(n) if real[i]]
    right = sum(answer[i].item() in real[i] for i in with_label)
    assert details.real == (right, len(with_label))
    assert details.real_top1 == pytest.approx(100 * right / len(with_label))
    assert details.images_per_second > 0


def test_evaluate_gives_the_same_scores_and_a_limit_counts() -> None:
    model, data = model_of(True), digits()
    scores, _ = evaluate_in_detail(model, data, ALONE, **OPTIONS)
    assert evaluate(model, data) == scores
    assert evaluate(model, data, limit=40).images == 40


def _worker(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store-{world}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    result = evaluate_in_detail(model_of(True), digits(), World(rank, world, rank, torch.device("cpu")), **OPTIONS)
    torch.save(result, f"{folder}/{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_three_processes_count_every_image_once(tmp_path: Path) -> None:
    scores, details = evaluate_in_detail(model_of(True), digits(), ALONE, **OPTIONS)
    world = 3
    in_processes(_worker, world, world, str(tmp_path))
    for rank in range(world):
        theirs, more = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=False)
        assert replace(theirs, loss=0.0) == replace(scores, loss=0.0)
        assert theirs.loss == pytest.approx(scores.loss, rel=1e-6)
        assert torch.equal(more.confusion, details.confusion)
        assert torch.equal(more.bins[:, [0, 2]], details.bins[:, [0, 2]])


def test_real_labels_are_found_by_the_number_in_a_name(tmp_path: Path) -> None:
    table = [[i % 7] for i in range(50_000)]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(table))
    data = digits().head(2)
    named = replace(
        data, files=np.array([b"val/a/ILSVRC2012_val_00000001.JPEG", b"val/b/ILSVRC2012_val_00000010.JPEG"]),
        file_id=np.arange(2), member=np.array([b"", b""]),
    )  # fmt: skip
    assert real_labels(path, named) == [table[0], table[9]]
    with pytest.raises(DeitfastError, match="no ReaL label"):
        real_labels(path, data)
    path.write_text("{}")
    with pytest.raises(DeitfastError, match="no list of lists"):
        real_labels(path, named)
    with pytest.raises(DeitfastError, match="cannot be read as ReaL labels"):
        real_labels(tmp_path / "none.json", named)


def test_a_class_without_images_has_no_accuracy() -> None:
    details = Details(torch.tensor([[2, 0], [0, 0]]), torch.zeros(15, 3), None, 1.0)
    assert details.per_class[0] == 100
    assert details.per_class[1].isnan()
    assert details.real_top1 is None
    assert Scores(1.0, 2.0, 3.0, 4).top1_head is None


def test_the_command_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    weights = tmp_path / "x.safetensors"
    save_file(create_model("deit_digits_patch4_16", num_classes=10).state_dict(), weights)
    command = ["eval", "--weights", str(weights), "--data", "digits", "--device", "cpu"]
    main([*command, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "deit_digits_patch4_16"
    assert len(facts["per_class"]) == 10
    assert {"top1", "top5", "loss", "images", "ece", "images_per_second", "crop_ratio"} <= set(facts)
    main([*command, "--plots", str(tmp_path / "plots")])
    assert f"top-1 {facts['top1']:.2f} %" in capsys.readouterr().out
    with open(tmp_path / "plots" / "per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == pytest.approx(facts["per_class"], abs=1e-3)
    assert sum(int(row["images"]) for row in rows) == facts["images"]
    for name in ("confusion.png", "calibration.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["test --weights x --data x --plots x", "report ."])
def test_without_matplotlib_what_draws_is_refused_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "recipe.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(command.split())
    said = capsys.readouterr().err
    assert said == "error: plots need matplotlib: pip install matplotlib, our extra [report]\n"


def test_the_number_of_classes_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "x.safetensors"
    save_file(create_model("deit_digits_patch4_16", num_classes=4).state_dict(), weights)
    with pytest.raises(SystemExit):
        main(["test", "--weights", str(weights), "--data", "digits", "--device", "cpu"])
    assert "the model has 4 classes without names, digits has 10" in capsys.readouterr().err
