"""The ops that a run or a model is about to use, verified on the GPU that it is about to use.

    verdict = verify(Question.of_training(...), device, say)
    adopt(verdict)                                     # what is wrong or slow there runs as eager PyTorch

The first time on a GPU takes as long as compiling the kernels and some seconds, later ones a look into the cache.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deitfast.errors import DeitfastError, say
from deitfast.kernels import replaced
from deitfast.kernels.catalogue import OPS, Shape
from deitfast.verification import process
from deitfast.verification.check import check
from deitfast.verification.process import READY, ProcessEnded
from deitfast.verification.verdict import REPORT, OpVerdict, Verdict, machine, remembered

BLOCK_OPS = ("layernorm_attention", "layernorm_mlp")
TRAINING_OPS = ("input_patches", "patch_embed", *BLOCK_OPS, "mixed_cross_entropy")


@dataclass(frozen=True)
class Question:
    """What is to be verified. The sizes are those of `Shape`; dtype: torch's name of one.

    backward: also gradients. timed: also which form is the fastest. without: optional tensors that are not given.
    subset: samples for which a branch runs, where drop-path skips the others' compute.
    """

    ops: tuple[str, ...]
    width: int
    heads: int
    tokens: int
    batch: int
    dtype: str
    prefix: int = 1
    patch_size: int = 16
    classes: int = 1000
    backward: bool = True
    without: tuple[str, ...] = ()
    subset: int = 0
    timed: bool = True

    def shape(self) -> Shape:
        return Shape(
            self.width, self.heads, self.tokens, self.batch, self.prefix, self.patch_size, self.classes
        )  # fmt: skip


def verify(question: Question, device: torch.device, say: Callable[[str], None]) -> Verdict:
    """What is known of the ops on `device`, a GPU; found out where nothing is. say: what goes on meanwhile."""
    key = {"question": asdict(question), **machine(device)}

    def find() -> dict[str, Any]:
        say(f"verifying {len(question.ops)} kernels on this {machine(device)['gpu']}, once: {', '.join(question.ops)}")
        return ask(question, device).record()

    return Verdict.of(remembered(key, find, keeps=lambda found: not found["unverified"]))


@functools.cache
def trust(question: Question, device: torch.device) -> None:
    """`verify` and `adopt` once a process, telling on stderr."""
    verdict = verify(question, device, say)
    adopt(verdict)
    for line in told(verdict):
        say(line)


def ask(question: Question, device: torch.device) -> Verdict:
    """The verdict, from processes of their own: one that an op ruins is followed by another for the ops left."""
    verdict, left = Verdict(), list(question.ops)
    while left:
        under_way, why, before = "", "it ended without an answer", len(left)
        try:
            job = {"question": asdict(question) | {"ops": list(left)}, "device": str(device)}
            for answer in process.answers(__name__, job):
                under_way = answer.pop("begins", "")
                if not under_way:
                    verdict.ops.append(OpVerdict(**answer))
                    left.remove(answer["op"])
        except ProcessEnded as end:
            why = str(end)
        if under_way:
            verdict.ops.append(OpVerdict(under_way, replaced.EAGER, why))
            left.remove(under_way)
        if len(left) == before:
            verdict.unverified = why
            break
    return verdict


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `ask` has done in another process."""
    question, device = Question(**job["question"]), torch.device(job["device"])
    torch.zeros(1, device=device)
    yield READY
    for name in question.ops:
        yield {"begins": name}
        found = check(
            OPS[name], question.shape(), getattr(torch, question.dtype), device, int.from_bytes(os.urandom(3)),
            question.timed, backward=question.backward, without=frozenset(question.without), subset=question.subset,
        )  # fmt: skip
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
    """Let each op run in the form that the verdict gives it, from now on. insist: raise DeitfastError instead."""
    if insist and (lines := told(verdict)):
        raise DeitfastError(f"{lines[0]}. --fused yes asks for the kernels; give --fused auto to go on without them")
    replaced.choose(verdict.forms)


def told(verdict: Verdict) -> list[str]:
    """A line for each op that does not run its kernels."""
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
