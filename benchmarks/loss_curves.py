"""Does the fast step learn like the slow one? Loss curves of the same run in several ways, beside the spread of seeds.

    python -m benchmarks.loss_curves --data DIR [--model deit_tiny] [--steps 300] [--batch 256] [--out FILE]
    python -m benchmarks.loss_curves --device cpu --quick

The ways are training as it runs (`deitfast.training.train`, the same images in the same order): the engine with fused
blocks in bf16, eager PyTorch in the plain loop in bf16 and in fp32, and the last with another seed. Curves are averaged
over windows of steps. The engine is fine where its largest distance from eager fp32 is at most that of the two seeds.

Exit status 1 where it is not, 2 without the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Budget, Recorder
from deitfast.model.work import full_name
from deitfast.recipe import Recipe
from deitfast.training.train import train

EXACT, OTHER_SEED, OURS = "eager fp32", "eager fp32, another seed", "ours"
_WINDOWS = 15


@dataclass(frozen=True)
class Run:
    """One way to train."""

    engine: str
    fused: str
    precision: str
    seed: int = 0


def runs(device: str) -> dict[str, Run]:
    """Way -> run; on CPU the engine runs in fp32 too, as training there does."""
    ours = Run("auto", "yes", "bf16") if device == "cuda" else Run("auto", "no", "fp32")
    return {
        EXACT: Run("plain", "no", "fp32"),
        OTHER_SEED: Run("plain", "no", "fp32", seed=1),
        OURS: ours,
        "eager bf16": Run("plain", "no", "bf16"),
    }


def losses(base: Recipe, run: Run, steps: int) -> list[float]:
    """Loss of every step."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(
            base, out=folder, engine=run.engine, fused=run.fused, precision=run.precision, seed=run.seed, log_every=1,
            save_minutes=1e9,
        )  # fmt: skip
        train(recipe, stop_at=steps)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def windows(values: Sequence[float]) -> list[float]:
    """Means of about `_WINDOWS` equal parts."""
    size = max(1, len(values) // _WINDOWS)
    return [sum(values[i : i + size]) / size for i in range(0, len(values) - size + 1, size)]


def distance(one: Sequence[float], two: Sequence[float]) -> float:
    """Largest difference of the averaged curves."""
    return max(abs(a - b) for a, b in zip(windows(one), windows(two), strict=True))


def verdict(curves: dict[str, list[float]]) -> tuple[bool, str]:
    """Whether ours lies within the spread of two seeds, and a sentence."""
    spread, ours = (distance(curves[EXACT], curves[way]) for way in (OTHER_SEED, OURS))
    fine = ours <= spread
    words = "within" if fine else "OUTSIDE"
    return fine, f"ours is at most {ours:.4f} from eager fp32, two seeds of it {spread:.4f}: {words} the spread"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_curves")
    arguments(parser)
    parser.add_argument("--data", default="digits", help="training images; default: the packaged digits")
    parser.add_argument("--model", help="default: deit_tiny; with --quick the digits model")
    parser.add_argument("--steps", type=int, help="default 300; with --quick 30")
    parser.add_argument("--batch", type=int, help="default 256; with --quick 64")
    options = parser.parse_args(argv)
    if not ready("loss_curves", options.device):
        return 2
    steps = options.steps or (30 if options.quick else 300)
    model = options.model or ("deit_digits_patch4_16" if options.quick else "deit_tiny")
    batch, budget = options.batch or (64 if options.quick else 256), Budget(options.minutes)
    base = replace(
        Recipe(), model=full_name(model), data=options.data, batch=batch, epochs=10**4, device=options.device, lr=5e-4,
        warmup_epochs=1.0, mix_group=min(128, batch), eval_every=10**4, workers=0,
    )  # fmt: skip
    curves: dict[str, list[float]] = {}
    with Recorder(options.out, "loss_curves", options.device, options.quick) as recorder:
        for way, run in runs(options.device).items():
            key = {"op": "loss_curves", "model": model, "batch": batch, "data": Path(options.data).name, "way": way}
            row: dict[str, Any] = {"key": key}
            if budget.fits(0.0):
                curves[way] = losses(base, run, steps)
                row["losses"] = curves[way]
            else:
                row["skipped"] = "no time left"
            recorder.add(row)
        if not {EXACT, OTHER_SEED, OURS} <= curves.keys():
            print("loss_curves: no time left for a verdict", file=sys.stderr)
            return 1
        fine, words = verdict(curves)
        recorder.note("verdict", words)
        print(words)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
