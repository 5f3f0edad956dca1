"""One op on this device: is it right, repeatable, inside its memory, fit for a CUDA graph; which form is fastest?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deitfast.cuda_graph import capture
from deitfast.errors import first_line
from deitfast.kernels.catalogue import Draw, Op, Shape
from deitfast.kernels.replaced import EAGER, chosen
from deitfast.kernels.tunable import picked
from deitfast.verification.arena import Arena
from deitfast.verification.case import Case, Expected
from deitfast.verification.choice import Offers, fastest_form
from deitfast.verification.verdict import OpVerdict


def check(
    op: Op, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, timed: bool = True,
    offers: Offers | None = None, **of_case: Any,
) -> OpVerdict:  # fmt: skip
    """What there is to say of `op` at `shape`; with half the batch where the GPU's memory does not suffice.

    timed: a right op's fastest form, not just itself, where its reference fits into a CUDA graph; offers: of what.
    of_case: keywords of `Case.draw`.
    """
    offers = offers or Offers()
    try:
        case = Case.draw(op, shape, Draw(seed, dtype, device), **of_case)
        other = Case.draw(op, shape, Draw(seed + 1, dtype, device), **of_case)
        with chosen(), picked(offers.settled):
            expected = Expected(case.exact(), case.run(op.reference))
            why = _attempt(lambda: _wrong(case, other, expected))
        if why:
            return OpVerdict(op.name, EAGER, why, seed=seed)
        if not timed or op.exact or device.type != "cuda":
            return OpVerdict(op.name, seed=seed)
        return fastest_form(case, expected, _attempt, offers, seed)
    except torch.OutOfMemoryError:
        if shape.batch < 4:
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    half = {**of_case, "subset": of_case.get("subset", 0) // 2}
    return check(op, replace(shape, batch=shape.batch // 4 * 2), dtype, device, seed, timed, offers, **half)


def _attempt(question: Callable[[], str]) -> str:
    """The answer, or how the op failed to run."""
    try:
        return question()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of its compiler, of CUDA: whatever it is, the op does not run here
        does = "does not compile" if type(error).__module__.startswith("triton.compiler") else "raises"
        return f"it {does}: {type(error).__name__}: {first_line(error)}"


def _wrong(case: Case, other: Case, expected: Expected) -> str:
    """What is wrong with an op, in words; empty where nothing is."""
    arena = Arena(case.device)
    placed = {name: arena.place(x) for name, x in case.tensors.items()}
    with arena.allocating():
        first, second = ({name: x.clone() for name, x in case.run(case.op.function, placed).items()} for _ in range(2))
    if arena.touched():
        return "it writes outside of its tensors"
    for name, x in placed.items():
        if not torch.equal(x, case.tensors[name]):
            return f"it changes its input {name}"
    if why := expected.problem(first):
        return why
    for name, x in first.items():
        if not torch.equal(x, second[name]):
            return f"{name}: a second call gives {int((x != second[name]).sum())} other values"
    return _wrong_in_graph(other, case, expected) if case.device.type == "cuda" else ""


def _wrong_in_graph(recorded: Case, replayed: Case, expected: Expected) -> str:
    """What is wrong when the op is captured on some values and replayed on others."""
    graph, found = capture(partial(recorded.run, recorded.op.function), device=recorded.device)
    for name, x in recorded.tensors.items():
        x.copy_(replayed.tensors[name])
    if recorded.dout is not None and replayed.dout is not None:
        recorded.dout.copy_(replayed.dout)
    graph.replay()
    why = expected.problem(found)
    graph.reset()
    return f"replayed in a CUDA graph, {why}" if why else ""
