"""The ops that a run or a model is about to use, verified on the GPU that it is about to use.

    verdict = verify(Question.of_training(...), device, say)
    adopt(verdict)                                     # what is wrong or slow there runs as eager PyTorch

The first time on a GPU takes as long as compiling the kernels and some seconds, later ones a look into the cache.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from deitfast.errors import DeitfastError, say
from deitfast.kernels import catalogue, replaced
from deitfast.kernels.catalogue import Shape
from deitfast.kernels.gradient_free import GRADIENT_FREE
from deitfast.kernels.tunable import entry_of, pick, recorded
from deitfast.precision import sum_in_fp32
from deitfast.verification import process
from deitfast.verification.check import check
from deitfast.verification.choice import Offers
from deitfast.verification.process import ProcessEnded
from deitfast.verification.verdict import (
    OTHER_ENTRIES,
    REPORT,
    OpVerdict,
    Verdict,
    keep,
    machine,
    recall,
    remembered,
)

BLOCK_OPS = ("layernorm_attention", "layernorm_mlp")
FUSED_OPS = (*BLOCK_OPS, "layernorm_qkv", "linear_residual")
"""Of fused blocks, the last one included, whose attention is for the prefix tokens alone."""
TRAINING_OPS = ("image_ops", "input_patches", "patch_embed", *FUSED_OPS, "mixed_cross_entropy", "adamw")
OPS = {**catalogue.OPS, **GRADIENT_FREE}


@dataclass(frozen=True)
class Question:
    """What is to be verified. dtype: torch's name of one.

    backward: also gradients. timed: also which form is the fastest. without: optional tensors that are not given.
    subset: samples for which a branch runs, where drop-path skips the others' compute.
    """

    ops: tuple[str, ...]
    shape: Shape
    dtype: str
    backward: bool = True
    without: tuple[str, ...] = ()
    subset: int = 0
    timed: bool = True


def verify(question: Question, device: torch.device, say: Callable[[str], None]) -> Verdict:
    """What is known of the ops on `device`, a GPU; found out where nothing is. say: what goes on meanwhile."""
    known = searched(device)
    key = {"question": asdict(question), "searched": known, **machine(device)}

    def find() -> dict[str, Any]:
        say(f"verifying {len(question.ops)} kernels on this {machine(device)['gpu']}, once: {', '.join(question.ops)}")
        return ask(question, device, say, known=known).record()

    return Verdict.of(remembered(key, find, keeps=lambda found: not found["unverified"]))


@functools.cache
def trust(question: Question, device: torch.device) -> None:
    """`verify` and `adopt` once a process, telling on stderr."""
    verdict = verify(question, device, say)
    adopt(verdict)
    for line in told(verdict):
        say(line)


def search(question: Question, device: torch.device, say: Callable[[str], None], minutes: float) -> Verdict:
    """What the ops' kernels run fastest by, of every entry that is worth a search; kept for the runs to come, op by op.

    Those try what was found beside their tables' entries, at their own shapes, and verify it as they do these.
    """
    ops = [op for op in question.ops if op not in GRADIENT_FREE]  # those have no constants to search
    say(f"searching the launch constants of {len(ops)} ops on this {machine(device)['gpu']}, {minutes:g} min")
    verdict, end = Verdict(), time.monotonic() + 60 * minutes
    for i, op in enumerate(ops):
        share = max(1.0, end - time.monotonic()) / 60 / (len(ops) - i)
        known = searched(device)
        found = ask(replace(question, ops=(op,)), device, say, known=known, minutes=share)
        keep(_key_of_search(device), {**known, **{name: recorded(entry) for name, entry in found.launches.items()}})
        verdict.ops += found.ops
        verdict.unverified = verdict.unverified or found.unverified
    return verdict


def searched(device: torch.device) -> dict[str, Any]:
    """Selection -> entry, as JSON, of what `search` found on this GPU with this code; empty where it never ran."""
    return recall(_key_of_search(device)) or {}


def _key_of_search(device: torch.device) -> dict[str, Any]:
    return {"search": "launches", **machine(device)}


def ask(
    question: Question, device: torch.device, say: Callable[[str], None], *, known: dict[str, Any], minutes: float = 0
) -> Verdict:
    """The verdict, from processes of their own: one that an op ruins is followed by another for the ops left.

    known: entries to try beside the tables', as `searched` gives them. minutes: of a search of all entries; 0 tries a
    few. An entry that ends the process is left out, and its op asked again.
    """
    verdict, left, barred, end_of_search = Verdict(), list(question.ops), list[str](), time.monotonic() + 60 * minutes
    while left:
        under_way, tries, why, before = "", "", "it ended without an answer", len(left)
        job = {
            "question": asdict(question) | {"ops": list(left)},
            "device": str(device),
            "settled": {name: entry for op in verdict.ops for name, entry in op.launches.items()},
            "known": known,
            "barred": list(barred),
            "search_s": max(1.0, end_of_search - time.monotonic()) if minutes else 0.0,
        }
        try:
            for answer in process.answers(__name__, job):
                if "begins" in answer:
                    under_way = answer["begins"]
                elif "tries" in answer:
                    tries = answer["tries"]
                elif "says" in answer:
                    say(answer["says"])
                else:
                    verdict.ops.append(OpVerdict(**answer))
                    left.remove(answer["op"])
                    under_way = ""
        except ProcessEnded as end:
            why = str(end)
        if tries:
            barred.append(tries)
        elif under_way:
            verdict.ops.append(OpVerdict(under_way, replaced.EAGER, why))
            left.remove(under_way)
        elif len(left) == before:
            verdict.unverified = why
            break
    return verdict


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `ask` has done in another process."""
    question, device = Question(**job["question"]), torch.device(job["device"])
    shape = Shape(**job["question"]["shape"])
    settled, known = ({name: entry_of(x) for name, x in job[part].items()} for part in ("settled", "known"))
    deadline = time.monotonic() + job["search_s"]
    torch.zeros(1, device=device)
    sum_in_fp32()
    for name in question.ops:
        yield {"begins": name}
        offers = Offers(
            settled, frozenset(job["barred"]), known,
            searched=job["search_s"] > 0, deadline=deadline if job["search_s"] else math.inf,
        )  # fmt: skip
        found = check(
            OPS[name], shape, getattr(torch, question.dtype), device, int.from_bytes(os.urandom(3)),
            question.timed, offers,
            backward=question.backward, without=frozenset(question.without), subset=question.subset,
        )  # fmt: skip
        settled = {**settled, **Verdict([found]).launches}
        yield asdict(found)
        if found.why and not _healthy(device):
            return


def _healthy(device: torch.device) -> bool:
    """Whether CUDA still answers after an op has failed."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def adopt(verdict: Verdict, *, insist: bool = False) -> None:
    """Let each op run in the form and by the entries of the verdict. insist: raise DeitfastError unless by kernels."""
    if insist and (lines := _replaced(verdict)):
        raise DeitfastError(f"{lines[0]}. --fused yes asks for the kernels; give --fused auto to go on without them")
    replaced.choose(verdict.forms)
    pick(verdict.launches)


def told(verdict: Verdict) -> list[str]:
    """A line for each op that does not run its kernels, or not by its tables' entries."""
    return _replaced(verdict) + [
        f"{op.op} runs its kernels by other entries than the table's, {op.ms[OTHER_ENTRIES]:.3f} instead of "
        f"{op.ms[replaced.OURS]:.3f} ms: {'; '.join(f'{name}: {entry}' for name, entry in op.faster.items())}"
        for op in verdict.ops
        if op.faster
    ]


def _replaced(verdict: Verdict) -> list[str]:
    lines = [
        f"{op.op} runs as {op.form} PyTorch: its kernels are {op.why}"
        if op.right
        else f"{op.op} runs as {op.form} PyTorch: its kernels are wrong on this GPU: {op.why}. {REPORT}"
        for op in verdict.ops
        if op.form != replaced.OURS
    ]
    if verdict.unverified:
        lines.append(f"the kernels could not be verified on this GPU: {verdict.unverified}. {REPORT}")
    return lines
