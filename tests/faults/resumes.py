"""Rows 5 to 9, 13 and 17: runs that go on: after stops, at other numbers of processes, after NaN, with changes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.data.conftest import picture
from tests.faults.harness import (
    STEPS,
    assert_same,
    changed,
    faults,
    losses,
    metrics,
    reached,
    reference,
    running,
    stop_after,
    tensors_of,
    train,
)  # fmt: skip


def resumed(folder: Path, count: int) -> str:
    """Row 5: stopped and resumed so many times: bitwise."""
    whole, out = reference(folder), folder / "resumed"
    stop_after(out, *sorted(random.Random(5).sample(range(1, STEPS), count)))
    train(out)
    assert_same(whole, out)
    return f"{count} resumes of one run, bitwise"


# What FLAGS have not: the other forms of drop-path and distillation, LAMB, RandAugment, colour jitter.
REST = {
    "optimizer": "lamb", "adam-eps": 1e-6, "drop-path-form": "subset", "distillation": "hard", "color-jitter": 0.3,
    "rand-augment": "rand-m9-mstd0.5-inc1", "class-weights": "balanced", "smoothing": 0.1, "layer-scale": 0.1,
}  # fmt: skip


def everything_on(folder: Path, count: int) -> str:
    """Row 6: what the other rows' runs have not switched on, stopped and resumed: bitwise."""
    rest: dict[str, object] = {name.replace("-", "_"): value for name, value in REST.items()}
    rest["launcher"] = ("--wire=bf16",)
    whole, out = reference(folder, **rest), folder / "everything"
    stop_after(out, *sorted(random.Random(6).sample(range(1, STEPS), count)), **rest)
    train(out, **rest)
    assert_same(whole, out)
    return f"{count} resumes with {', '.join(REST)} and gradients summed in bf16: bitwise"


# Process 1 alone gets a signal in the second of its first evaluation's tallies; a teacher's, in the set-up, is none.
SIGNAL_IN_EVALUATION = """
both, tally, calls = training.evaluate_both, evaluate._tally, []


def evaluating(*given):
    calls.append("begun")
    return both(*given)


def sending(*given):
    if calls:
        calls.append("tally")
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return tally(*given)


training.evaluate_both, evaluate._tally = evaluating, sending
"""


def saved_anywhere(folder: Path, count: int) -> str:
    """Row 7: stopped after the first step, in mid-epoch, at its end, in evaluation, before and after the last step."""
    epochs = {"epochs": 2, "batch": 128, "eval_every": 1}  # of ten steps
    whole, out = reference(folder, **epochs), folder / "anywhere"
    stop_after(out, 1, 4, **epochs)
    with running(out, recipe=changed(folder, SIGNAL_IN_EVALUATION), **epochs) as run:
        assert run.wait() == 75, run.text()[-3000:]
    assert reached(out)["step"] == STEPS // 2
    assert not metrics(out, "top1"), "the evaluation was not given up"
    stop_after(out, STEPS // 2, STEPS - 1, STEPS, **epochs)
    train(out, **epochs)  # nothing is left to train
    assert_same(whole, out)
    scores = [[{k: line[k] for k in line if "top" in k} for line in metrics(one, "top1")] for one in (whole, out)]
    assert scores[0] == scores[1], scores
    best = [tensors_of(one / "best" / "model.safetensors") for one in (whole, out)]
    assert best[0] == best[1], "another best checkpoint"
    return "stops after steps 1, 4, 10 (in the evaluation, and after it), 19 and 20: bitwise, best/ too"


def other_worlds(folder: Path, count: int) -> str:
    """Row 8: 2 processes, 1, and 2 again, two micro-batches a step in each case: bitwise."""
    halves = {"batch": 32, "micro_batch": 16}
    whole, out = reference(folder, **halves), folder / "worlds"
    last = reached(whole)["step"]
    stops = sorted(random.Random(8).sample(range(1, last), 2 * count))
    for i, step in enumerate(stops):
        stop_after(out, step, processes=2 - i % 2, **halves)
    train(out, **halves)
    assert state_differences(whole, out) == 0.0
    losses_apart = max(abs(a - b) for a, b in zip(losses(whole), losses(out), strict=True))
    return f"{2 * count} stops, at 2 and 1 processes by turns: bitwise (logged losses within {losses_apart:.1e})"


def many_worlds(folder: Path, count: int) -> str:
    """Row 9: 4 processes, 3, 2 and 1: the same samples; logits within 2e-3, evaluated loss within 1e-4."""
    shares = {"batch": 96, "micro_batch": 8}
    whole, out = reference(folder, **shares), folder / "many"
    last = reached(whole)["step"]
    for processes, step in ((4, last // 4), (3, last // 2), (2, 3 * last // 4)):
        stop_after(out, step, processes=processes, **shares)
    train(out, processes=1, **shares)
    assert reached(out)["step"] == last
    steps = max(abs(a - b) for a, b in zip(losses(whole), losses(out), strict=True))
    weights = state_differences(whole, out)
    logits = logits_apart(whole, out)
    evaluated = [metrics(one, "top1")[-1]["val_loss"] for one in (whole, out)]
    loss = abs(evaluated[0] - evaluated[1])
    assert steps < 1e-4, f"losses of the steps are {steps:.1e} apart: other samples"
    assert logits < 2e-3, logits
    assert loss < 1e-4, loss
    return (
        f"a quarter of the steps at 4, 3, 2 and 1 processes against 2: losses within {steps:.1e}, weights "
        f"{weights:.1e}, logits {logits:.1e}, evaluated loss {loss:.1e}; not bitwise"
    )


def state_differences(one: Path, two: Path) -> float:
    """The largest difference of any value of the newest checkpoints."""
    from deitfast.training.checkpoint import load_newest

    found = [load_newest(out / "ckpt", print) for out in (one, two)]
    assert found[0] is not None
    assert found[1] is not None
    a, b = ({(s, n): t for s, ts in f.tensors.items() for n, t in ts.items()} for f in found if f)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def logits_apart(one: Path, two: Path) -> float:
    """The largest difference of the best models' logits, on random images."""
    from deitfast.model.factory import load_model

    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        heads = [load_model(None, out / "best").model.eval()(images) for out in (one, two)]
    return float((heads[0] - heads[1]).abs().max())


# Process 1 alone has a loss of NaN in `left` steps from number `first` on.
POISONED = """
loss, step, left = FlatEngine.loss, FlatEngine.__call__, [{left}]


def counting(self, batches, number, lr):
    self.poisoned = number >= {first} and left[0] > 0 and os.environ["RANK"] == "1"
    left[0] -= self.poisoned
    step(self, batches, number, lr)


FlatEngine.loss = lambda self, inputs: loss(self, inputs) * (float("nan") if self.poisoned else 1.0)
FlatEngine.__call__ = counting
"""


def not_finite(folder: Path, count: int) -> str:
    """Row 13: NaN on one process: skipped by all; ten in a row: rolled back, bitwise; again: exit 3."""
    whole, once, row = reference(folder), folder / "once", folder / "row"
    train(once, recipe=changed(folder, POISONED.format(first=5, left=1)))
    assert [line["skipped"] for line in metrics(once, "skipped")] == [0] * 5 + [1] * (STEPS - 5)
    assert all(torch.isfinite(torch.tensor(losses(once))))
    stop_after(row, 4)
    again = folder / "again"
    shutil.copytree(row, again)
    rare: dict[str, Any] = {"save_minutes": 1e6, "restarts": 0}
    with running(row, recipe=changed(folder, POISONED.format(first=5, left=10)), **rare) as run:
        assert run.wait() == 0, run.text()[-3000:]
        assert "Going back to the checkpoint of step 4" in run.text(), run.text()[-3000:]
    assert_same(whole, row)
    with running(again, recipe=changed(folder, POISONED.format(first=5, left=1000)), **rare) as run:
        assert run.wait() == 3, f"{run.process.returncode}\n{run.text()[-3000:]}"
        assert "This is the second time" in run.text()
    assert len(faults(again, "roll-back")) == 1
    return "1 step of one process skipped by both; 10 in a row: back to step 4, bitwise at the end; again: exit 3"


def changed_since(folder: Path, count: int) -> str:
    """Row 17: another recipe or other data is refused with the difference, unless allowed; other code is told."""
    data, out = folder / "data", folder / "run"
    for split, images in (("train", 40), ("val", 8)):
        for seed, label in ((0, "cat"), (100, "dog")):
            (data / split / label).mkdir(parents=True)
            for i in range(images):
                picture(20, 20, seed + i).save(data / split / label / f"{i}.png")
    settings = {
        "data": data, "batch": 16, "micro_batch": 8, "epochs": 2, "repeats": 1, "distillation": None, "teacher": None,
    }  # fmt: skip
    stop_after(out, 3, processes=1, **settings)

    def started(code: int, *words: str, **more: object) -> None:
        with running(out, processes=1, **(settings | more)) as run:
            assert run.wait() == code, f"{run.process.returncode}\n{run.text()[-3000:]}"
            for word in words:
                assert word in run.text(), f"{word}\n{run.text()[-3000:]}"

    started(2, "--lr is 0.5, was 0.001", lr=0.5)
    facts = json.loads((out / "env.json").read_text())
    (out / "env.json").write_text(json.dumps(facts | {"torch": "2.0.0", "code": "0"}))
    stop_at = changed(folder, "training.train = partial(training.train, stop_at=5)")
    started(0, "since the last start torch was 2.0.0, is ", "code was 0, is ", recipe=stop_at)
    (data / "train" / "cat").rename(data / "train" / "third")
    (data / "train" / "dog").rename(data / "train" / "cat")
    (data / "train" / "third").rename(data / "train" / "dog")
    started(2, "is not the data that", "80 of its 80 images are gone or changed")
    started(0, lr=0.5, allow_changes=True)
    return "another lr and permuted labels: refused, told, allowed by --allow-changes; torch and code: told"
