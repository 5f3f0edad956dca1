"""What a run finds out about its GPU before its first step: which ops run their kernels, and whether to capture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deitfast.data.augmentation import Augmentation
from deitfast.distributed import World
from deitfast.engine.trial import capture_problem
from deitfast.errors import DeitfastError, say
from deitfast.model.deit import DeiT
from deitfast.model.fused import FusedBlock, question_about
from deitfast.recipe import Recipe
from deitfast.verification.verdict import REPORT, OpVerdict, Verdict, machine
from deitfast.verification.verify import FUSED_OPS, Question, adopt, told, verify


def question(recipe: Recipe, model: DeiT, micro_batch: int, bf16: bool) -> Question:
    """The ops of one training step and of its images' augmentation, at its own shapes."""
    augmented = Augmentation(recipe, model.image_size, torch.device("cuda")).active
    ops = ["image_ops"] if augmented else []
    if recipe.engine != "plain":
        ops += ["input_patches", recipe.optimizer]
    if isinstance(model.blocks[0], FusedBlock):
        ops += ["patch_embed", *FUSED_OPS]
    ops.append("mixed_bce" if recipe.loss == "bce" else "mixed_cross_entropy")
    drops = max(model.drop_path_rates, default=0.0)
    skips = bool(drops) and recipe.drop_path_form == "subset"
    of_group = max(1, round(recipe.mix_group * (1 - drops)))
    absent = {"path_scale": not drops, "ema": not recipe.ema_decay}
    return question_about(
        model, tuple(ops), micro_batch, torch.bfloat16 if bf16 else torch.float32,
        without=tuple(name for name, is_absent in absent.items() if is_absent),
        subset=micro_batch // recipe.mix_group * of_group if skips else 0,
    )  # fmt: skip


def trust_kernels(
    recipe: Recipe, world: World, model: DeiT, micro_batch: int, bf16: bool, before: dict[str, Any],
    note: Callable[[str], None],
) -> Verdict:  # fmt: skip
    """What each op does from now on, the same on all processes: as --fused FILE says, else as the leading GPU shows.

    before: the choices of the run that is resumed, which hold on the same GPU, or empty.
    """

    def find() -> Verdict:
        if recipe.choices:
            return read_choices(Path(recipe.choices), world.device)
        if world.device.type != "cuda" or recipe.fused == "no":
            return Verdict()
        if before.get("machine") == machine(world.device):
            return Verdict.of(before["kernels"])
        return verify(question(recipe, model, micro_batch, bf16), world.device, say)

    verdict = world.lead(find)
    world.agree(lambda: adopt(verdict, insist=recipe.fused == "yes"))
    for line in told(verdict):
        note(line)
    if verdict.ops and verdict.all_ours and not recipe.choices:
        note(f"kernels: {len(verdict.ops)} of {len(verdict.ops)} verified on this GPU and in use")
    return verdict


def read_choices(path: Path, device: torch.device) -> Verdict:
    """The forms of ops that another run recorded in its env.json, or that `deitfast doctor --json` printed.

    Entries of launch tables are for the GPU and the code that they were found with, and are left out elsewhere.
    """
    try:
        found = json.loads(path.read_text())
        choices = found.get("choices", found)
        same = device.type == "cuda" and choices.get("machine") == machine(device)
        kept = ("op", "form", "why", "ms", "launches", "faster") if same else ("op", "form", "why")
        verdict = Verdict([OpVerdict(**{name: op[name] for name in kept}) for op in choices["kernels"]["ops"]])
        assert verdict.launches is not None  # every entry can be read
        return verdict
    except OSError as error:
        raise DeitfastError(f"--fused {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeitfastError(
            f"--fused {path} holds no choices. Give a run's env.json, or the output of `deitfast doctor --json`"
        ) from error


def trust_capture(
    recipe: Recipe, world: World, model: DeiT, classes: list[str], micro_batch: int, accumulation: int, bf16: bool,
    verdict: Verdict, note: Callable[[str], None],
) -> Recipe:  # fmt: skip
    """The recipe, with the step uncaptured where a capture is not to be trusted on this GPU; `graph` insists on it."""
    if world.device.type != "cuda" or recipe.engine not in ("auto", "graph"):
        return recipe

    size, device = model.image_size, world.device
    problem = world.lead(
        lambda: capture_problem(recipe, classes, size, micro_batch, accumulation, bf16, verdict, device)
    )
    if not problem:
        return recipe
    if recipe.engine == "graph":
        raise DeitfastError(f"the step cannot be captured as --engine graph asks: {problem}. Give --engine flat")
    note(f"the step runs uncaptured, and slower: a CUDA graph of it cannot be trusted on this GPU: {problem}. {REPORT}")
    return replace(recipe, engine="flat")
