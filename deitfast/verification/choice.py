"""Which form of an op that is right is the fastest here: its kernels, by which entries of their tables, or eager.

Entry by entry: each that the op offers (`deitfast.kernels.tunable`) takes the place of the table's own in the whole op,
must give what is right, and is timed beside the others. What beats the table goes together into the last comparison,
with the table's and with eager PyTorch. A tie goes to the table, and to the kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from deitfast.kernels.catalogue import Tensors
from deitfast.kernels.replaced import CUDNN, EAGER, OURS, chosen
from deitfast.kernels.tunable import Pick, Selection, described, picked, recorded, selections
from deitfast.verification import process, warm
from deitfast.verification.case import Case, Expected
from deitfast.verification.timing import fastest, milliseconds
from deitfast.verification.verdict import OTHER_ENTRIES, SLOWER, OpVerdict

_WITH_ATTENTION = ("attention", "layernorm_attention")
Attempt = Callable[[Callable[[], str]], str]
"""The answer to a question, or how what it is about failed to run."""


@dataclass(frozen=True)
class Offers:
    """What may be tried. settled: selections that another op has decided, with its entry. barred: what ends a process.

    known: entries that a search found fast on this GPU. searched: all that is worth a search, not a few, until
    `deadline`, a time of `time.monotonic`.
    """

    settled: Mapping[str, Pick] = field(default_factory=dict)
    barred: frozenset[str] = frozenset()
    known: Mapping[str, Pick] = field(default_factory=dict)
    searched: bool = False
    deadline: float = float("inf")

    def of(self, selection: Selection) -> list[Pick]:
        """What to try instead of a selection's own entry."""
        if selection.name in self.settled:
            return []
        found = list(selection.space if self.searched else selection.others)
        known = self.known.get(selection.name, selection.own)
        if known != selection.own and known not in found:
            found.append(known)
        return [entry for entry in found if _label(selection, entry) not in self.barred]

    def share(self, selections_left: int) -> Offers:
        """The same, with one selection's share of the time."""
        now = time.monotonic()
        return replace(self, deadline=now + (self.deadline - now) / selections_left)


def _label(selection: Selection, entry: Pick) -> str:
    return f"{selection.name}: {described(entry)}"


@dataclass(frozen=True)
class _Trials:
    """One op, run in one form after another."""

    case: Case
    expected: Expected
    attempt: Attempt
    offers: Offers

    def run(self, form: str, entries: Mapping[str, Pick]) -> Tensors:
        """The op in a form, by these entries and what is settled."""
        with chosen(**{self.case.op.name: form}), picked({**self.offers.settled, **entries}):
            return self.case.run(self.case.op.function)

    def right(self, form: str, entries: Mapping[str, Pick]) -> bool:
        return not self.attempt(lambda: self.expected.problem(self.run(form, entries)))

    def times_of(self, selection: Selection) -> dict[str, list[float]]:
        """Milliseconds by entry, of the table's own and of those that are right instead; none where nothing else is."""
        fit = [entry for entry in self.offers.of(selection) if self._fits(selection, entry)]
        calls = {described(entry): partial(self.run, OURS, {selection.name: entry}) for entry in (selection.own, *fit)}
        return milliseconds(calls, self.case.device) if fit else {}

    def _fits(self, selection: Selection, entry: Pick) -> bool:
        if time.monotonic() > self.offers.deadline:
            return False
        process.tell({"tries": _label(selection, entry)})
        fits = self.right(OURS, {selection.name: entry})
        process.tell({"tries": ""})
        return fits

    def compile(self, selection: Selection) -> None:
        """Bring all that a search tries into Triton's cache, with every core."""
        entries, left = self.offers.of(selection), self.offers.deadline - time.monotonic()
        for done in warm.compile_all(self.case, selection.name, entries, left):
            process.tell({"says": f"{self.case.op.name}, {selection.name}: {done} of {len(entries)} entries compiled"})


def fastest_form(case: Case, expected: Expected, attempt: Attempt, offers: Offers, seed: int) -> OpVerdict:
    """The verdict on an op that is right."""
    trials = _Trials(case, expected, attempt, offers)
    with selections() as asked:
        trials.run(OURS, {})
    better: dict[str, Pick] = {}
    tried: dict[str, dict[str, float]] = {}
    for i, selection in enumerate(asked.values()):
        if offers.searched:
            trials = replace(trials, offers=offers.share(len(asked) - i))
            trials.compile(selection)
        times = trials.times_of(selection)
        best = fastest(times, described(selection.own)) if times else described(selection.own)
        if best != described(selection.own):
            better[selection.name] = next(x for x in offers.of(selection) if described(x) == best)
        if times:
            tried[selection.name] = _medians(times)

    calls = {OURS: partial(trials.run, OURS, {})}
    if better and trials.right(OURS, better):
        calls[OTHER_ENTRIES] = partial(trials.run, OURS, better)
    for form in (EAGER, CUDNN) if case.op.name in _WITH_ATTENTION else (EAGER,):
        if trials.right(form, {}):
            calls[form] = partial(trials.run, form, {})
    times = milliseconds(calls, case.device)
    best, ms = fastest(times, OURS), _medians(times)
    if best in (OURS, OTHER_ENTRIES):
        own = {name: offers.settled.get(name, selection.own) for name, selection in asked.items()}
        picks = {**own, **(better if best == OTHER_ENTRIES else {})}
        faster = {name: described(entry) for name, entry in picks.items() if entry != own[name]}
        launches = {name: recorded(entry) for name, entry in picks.items()}
        return OpVerdict(case.op.name, OURS, "", ms, seed, launches, faster, tried)
    ours = min(ms[way] for way in (OURS, OTHER_ENTRIES) if way in ms)
    return OpVerdict(case.op.name, best, f"{SLOWER}: {ours:.3f} ms, {best} {ms[best]:.3f} ms", ms, seed, tried=tried)


def _medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}
