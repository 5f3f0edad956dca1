"""Checkpoints: round trip, damage of every kind found, the previous one used, never a silent start from zero."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from deitfast.errors import DeitfastError
from deitfast.integrity import damage, write_hashes
from deitfast.model.weights import save_weights
from deitfast.training.checkpoint import Checkpoint, load_newest, save


def state(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {stem: {"a.b": torch.randn(50, generator=generator)} for stem in ("model", "ema", "optim")}
    return Checkpoint(step, tensors, {"best": {"top1": 50.0}, "steps_per_epoch": 10})


def no_words(text: str) -> None:
    raise AssertionError(text)


def test_round_trip_keeps_the_two_newest(tmp_path: Path) -> None:
    assert load_newest(tmp_path, no_words) is None
    for step in (1, 20, 300):
        save(tmp_path, state(step))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0000020", "step-0000300"]
    assert (tmp_path / "latest").read_text() == "step-0000300"
    found = load_newest(tmp_path, no_words)
    assert found is not None
    assert found.step == 300
    assert found.state["best"] == {"top1": 50.0}
    for stem, tensors in state(300).tensors.items():
        assert torch.equal(found.tensors[stem]["a.b"], tensors["a.b"])
    assert not list(tmp_path.glob(".tmp*"))


def test_what_a_killed_save_leaves_behind_stops_no_later_one(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    (tmp_path / ".tmp-4121-latest").write_text("step-00000")  # killed between writing and renaming the pointer
    (tmp_path / ".tmp-step-0000002").mkdir()
    (tmp_path / ".tmp-step-0000002" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, state(2))
    assert not list(tmp_path.glob(".tmp*"))
    assert damage(tmp_path / "step-0000002") is None


def flip_bit(path: Path, chooser: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
    path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    chooser = random.Random(0)
    folder = save(tmp_path, state(7))
    for trial in range(100):
        path = sorted(folder.iterdir())[trial % 5]
        original = path.read_bytes()
        flip_bit(path, chooser)
        # A flip inside the manifest may leave it readable, but then it no longer describes the files.
        assert damage(folder) is not None or json.loads(path.read_bytes()) == json.loads(original)
        path.write_bytes(original)
    assert damage(folder) is None


@pytest.mark.parametrize("kind", ["truncated", "missing", "flipped", "no manifest", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_and_says_so(tmp_path: Path, kind: str) -> None:
    save(tmp_path, state(10))
    newest = save(tmp_path, state(25))
    victim = newest / "optim.safetensors"
    if kind == "truncated":
        os.truncate(victim, 100)
    elif kind == "missing":
        victim.unlink()
    elif kind == "flipped":
        flip_bit(victim, random.Random(1))
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        for path in newest.iterdir():
            path.write_bytes(b"")
    words: list[str] = []
    found = load_newest(tmp_path, words.append)
    assert found is not None
    assert found.step == 10
    assert len(words) == 1
    assert words[0].startswith("step-0000025/")
    assert words[0].endswith("Using step-0000010 (15 steps lost)")


def test_nothing_whole_left_is_refused_and_leftovers_are_swept(tmp_path: Path) -> None:
    folder = save(tmp_path, state(10))
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        DeitfastError, match=r"every checkpoint in .* is damaged: step-0000010/model.safetensors missing"
    ):
        load_newest(tmp_path, no_words)
    (tmp_path / ".tmp-step-0000011").mkdir()
    save(tmp_path, state(10))
    assert load_newest(tmp_path, no_words) is not None
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "state.json unreadable"),
        (b'{"step": 25}', "state.json unreadable (KeyError)"),
        (b'{"step": -5, "best": null, "steps_per_epoch": 10}', "state.json speaks of step -5"),
        (b'{"step": 1e30, "best": null, "steps_per_epoch": 10}', "state.json speaks of step 1e+30"),
        (b'{"step": 25, "best": null, "steps_per_epoch": 0}', "state.json speaks of step 25"),
        (b'{"step": 25, "best": {"top1": "x"}, "steps_per_epoch": 10}', "no accuracy of the best weights"),
        (b"\xff", "state.json unreadable (UnicodeDecodeError)"),
        (None, "state.json missing"),
    ],
)
def test_a_state_that_makes_no_sense_is_damage_too(tmp_path: Path, content: bytes | None, words: str) -> None:
    save(tmp_path, state(10))
    newest = save(tmp_path, state(25))
    (newest / "manifest.json").unlink()
    (newest / "state.json").unlink() if content is None else (newest / "state.json").write_bytes(content)
    write_hashes(newest)  # with the right hash
    said: list[str] = []
    found = load_newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert words in said[0]


def test_a_checkpoint_without_a_file_that_the_run_needs_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, state(10))
    newest = save(tmp_path, state(25))
    (newest / "ema.safetensors").unlink()
    (newest / "manifest.json").unlink()
    write_hashes(newest)
    said: list[str] = []
    assert load_newest(tmp_path, said.append, stems=("model", "optim")).step == 25  # type: ignore[union-attr]
    assert load_newest(tmp_path, said.append, stems=("model", "optim", "ema")).step == 10  # type: ignore[union-attr]
    assert said == ["step-0000025/ema.safetensors missing. Using step-0000010 (15 steps lost)"]


def test_weights_alone_carry_metadata(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_weights(tmp_path / "best" / "model.safetensors", {"w": torch.ones(2, 3).T}, {"model": "x"})
    with safe_open(tmp_path / "best" / "model.safetensors", "pt") as file:
        assert file.metadata().keys() == {"model", "sha256"}
        assert file.metadata()["model"] == "x"
        assert torch.equal(file.get_tensor("w"), torch.ones(3, 2))
