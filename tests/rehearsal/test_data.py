"""The loaders on the pretended device: the GPU's path beside the CPU's, its streams, its contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from deitfast.data import Dataset, EvalLoader, TrainLoader, dali, decoder, open_dataset
from deitfast.data.batch import Batch
from deitfast.data.decoder import choose_decoder
from deitfast.data.quarantine import Quarantine
from deitfast.distributed import World
from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe
from deitfast.use import graphs
from deitfast.use.evaluate import Scores, evaluate_each
from tests.rehearsal import cuda, memory

RECIPE = Recipe(model="deit_digits_patch4_16", data="digits", batch=32, mix_group=16, workers=1, decode="gpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset("digits")


def load(data: Dataset, recipe: Recipe, device: str, micro_batch: int = 32, steps: int = 2) -> list[Batch]:
    assert data.train is not None
    recipe = recipe if device != "cpu" else replace(recipe, decode="auto")
    with TrainLoader(data.train, recipe, 16, micro_batch=micro_batch, device=device, stop_step=steps) as loader:
        return list(loader)


@pytest.mark.parametrize(
    ("policy", "repeats", "micro_batch"), [("rand-m9-mstd0.5-inc1", 3, 16), ("three", 1, 32), ("none", 1, 32)]
)
def test_a_gpu_gets_what_a_cpu_gets(digits: Dataset, policy: str, repeats: int, micro_batch: int) -> None:
    recipe = replace(RECIPE, rand_augment=policy, repeats=repeats)
    pairs = zip(*(load(digits, recipe, device, micro_batch) for device in ("cuda:0", "cpu")), strict=True)
    for ours, exact in pairs:
        for name in ("labels", "index", "view", "erase", "lam", "mix_box"):
            assert getattr(ours, name).is_cuda
            assert torch.equal(getattr(ours, name).cpu(), getattr(exact, name)), name
        assert ours.images.is_cuda
        assert ours.images.is_contiguous()
        # DALI's resize and PIL's round differently.
        assert (ours.images.cpu().float() - exact.images.float()).abs().mean() < 2


def test_a_batch_is_handed_over_by_an_event_of_the_loaders_stream(digits: Dataset) -> None:
    load(digits, RECIPE, "cuda:0", micro_batch=16)
    handed = {number for what, _, number, thread in cuda.EVENTS if what == "record" and thread == "deitfast-batches"}
    waited = [number for what, _, number, thread in cuda.EVENTS if what == "wait_event" and thread == "MainThread"]
    assert len(waited) == 4
    assert set(waited) == handed
    assert sum(what == "record_stream" for what, *_ in cuda.EVENTS) == 4


def test_a_second_process_has_a_context_on_its_own_gpu_only(digits: Dataset) -> None:
    memory.DEVICE.contexts_forget()  # a fresh process
    torch.cuda.set_device(1)
    try:
        for batch in load(digits, RECIPE, "cuda:1", micro_batch=16):
            assert batch.images.device.index == batch.labels.device.index == 1
        assert memory.contexts() == [1], cuda.MADE_BY
    finally:
        torch.cuda.set_device(0)


def test_validation_batches_are_the_cpus(digits: Dataset) -> None:
    assert digits.val is not None
    val = digits.val.head(150)
    for decode in ("auto", "cpu"):
        ours = EvalLoader(val, 16, 0.875, 100, device="cuda:0", decode=decode)
        exact = EvalLoader(val, 16, 0.875, 100, device="cpu")
        for (images, labels), (exact_images, exact_labels) in zip(ours, exact, strict=True):
            assert torch.equal(labels.cpu(), exact_labels)
            assert (images.cpu().float() - exact_images.float()).abs().mean() < 2


def test_evaluation_scores_are_the_cpus(digits: Dataset) -> None:
    assert digits.val is not None
    torch.manual_seed(0)
    found = []
    model = create_model(RECIPE.model, num_classes=10, depth=2, fused=True)
    torch.nn.init.normal_(model.head.weight)
    for device in ("cpu", "cuda"):
        world, options = World(0, 1, 0, torch.device(device)), {"batch": 64, "workers": 1, "bf16": False}
        data = digits.val.head(100)
        found += evaluate_each(model.to(device), [contextlib.nullcontext], data, world, crop_ratio=0.875, **options)
    assert found[0].images == found[1].images == 100
    assert found[1].loss == pytest.approx(found[0].loss, rel=0.05)  # another resize


@contextlib.contextmanager
def turned(model: DeiT) -> Iterator[None]:
    """Another head, in the same memory."""
    with torch.no_grad():
        model.head.weight.neg_()
        yield
        model.head.weight.neg_()


def test_evaluation_is_one_graph_and_scores_what_it_does_uncaptured(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digits.val is not None
    torch.manual_seed(0)
    model = create_model(RECIPE.model, num_classes=10, depth=2, fused=True).to("cuda")
    torch.nn.init.normal_(model.head.weight)
    captures = Mock(wraps=graphs.capture)
    monkeypatch.setattr(graphs, "capture", captures)

    def scores() -> list[Scores]:
        world, weights = World(0, 1, 0, torch.device("cuda")), [contextlib.nullcontext, partial(turned, model)]
        options = {"crop_ratio": 0.875, "batch": 64, "workers": 1, "bf16": True}
        return evaluate_each(model, weights, digits.val.head(100), world, **options)

    captured = scores()
    assert captures.call_count == 1
    assert captured[0] != captured[1]
    captures.side_effect = RuntimeError("operation not permitted")
    assert scores() == captured
    assert "without CUDA graphs: one cannot be trusted here: operation not permitted" in "".join(capsys.readouterr())


def test_a_gpu_that_cannot_decode_is_told_and_the_cpu_decodes(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(encoded: object, where: str) -> object:
        if where == "gpu":
            raise RuntimeError("nvJPEG is not there")
        return dali.decode(encoded, "cpu")

    assert digits.train is not None
    said: list[str] = []
    monkeypatch.setattr(decoder, "decode_to_gpu", decode)
    assert choose_decoder("auto", digits.train, 16, torch.device("cuda", 0), 1, said.append) == "cpu"
    assert said.pop() == "decoding on the CPU: the GPU's decoder failed here (nvJPEG is not there)"
    monkeypatch.undo()
    monkeypatch.setattr(Quarantine, "by_pil", 60)  # they were decoded, but not by DALI
    assert choose_decoder("auto", digits.train, 16, torch.device("cuda", 0), 1, said.append) == "cpu"
    assert said == ["decoding on the CPU: the GPU's decoder failed here (DALI could not decode 60 of 64 images)"]


def test_the_decoder_is_measured_and_told(digits: Dataset) -> None:
    said: list[str] = []
    assert digits.train is not None
    chosen = choose_decoder("auto", digits.train, 16, torch.device("cuda", 0), 1, said.append)
    assert said[0].startswith(f"decoding on the {chosen.upper()}: measured ")
    with pytest.raises(DeitfastError, match="--decode gpu needs a GPU"):
        choose_decoder("gpu", digits.train, 16, torch.device("cpu"), 1, said.append)
