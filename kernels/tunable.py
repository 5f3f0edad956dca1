"""Which entry of a launch table a kernel runs by: the table's own, unless another was found faster on this GPU.

A function that selects an entry offers others beside it:

    @tunable(others=_other_tiles, space=_all_tiles)
    def linear_launch(arch, itemsize, N, K, epilogue, aligned_rows) -> Launch: ...

`others` and `space` take the same arguments and give entries that may run instead, or None where the kernel may be left
out and the launcher has another way: a few that are tried on first contact with a GPU, and all that are worth a search.
Whoever verifies, times or tunes an op runs it inside `selections`, which tells what it asked for, and inside `picked`,
which puts others in place. So an op offers a variant by offering an entry, and nothing else has to know of it.

The choice holds for the process, as its GPU does, for every thread.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ParamSpec, TypeVar, cast

from deitfast.kernels.common import Launch

Arguments = ParamSpec("Arguments")
Pick = Launch | None
Entry = TypeVar("Entry", bound=Pick, covariant=True)

PICKED: dict[str, Pick] = {}
"""Selection by name -> the entry that runs instead of its table's."""


@dataclass(frozen=True)
class Selection:
    """One use of a launch table. own: what the table says. others, space: what may run instead, without `own`."""

    name: str
    own: Pick
    others: tuple[Pick, ...]
    space: tuple[Pick, ...]


class Tunable:
    """A function that selects an entry; see the module. An argument `arch` is no part of a selection's name."""

    def __init__(self, select: Callable[..., Any], others: Callable[..., Any], space: Callable[..., Any]) -> None:
        functools.update_wrapper(self, select)
        self._select, self._others, self._space = select, others, space
        self._names = list(inspect.signature(select).parameters)

    def __call__(self, *args: Any) -> Any:
        if not (PICKED or _watching):
            return self._select(*args)
        name = self._name(args)
        for seen in _watching:
            seen.setdefault(name, (self, args))
        return PICKED[name] if name in PICKED else self._select(*args)

    def selection(self, *args: Any) -> Selection:
        """What a call with these arguments selects, and what could run instead."""
        own = self._select(*args)
        few, all_ = (tuple(x for x in _distinct(offer(*args)) if x != own) for offer in (self._others, self._space))
        return Selection(self._name(args), own, few, all_ or few)

    def _name(self, args: tuple[Any, ...]) -> str:
        told = (f"{name}={value}" for name, value in zip(self._names, args, strict=True) if name != "arch")
        return " ".join((self._select.__name__.strip("_"), *told))


_watching: list[dict[str, tuple[Tunable, tuple[Any, ...]]]] = []


def tunable(
    others: Callable[Arguments, Iterable[Pick]], space: Callable[Arguments, Iterable[Pick]] | None = None
) -> Callable[[Callable[Arguments, Entry]], Callable[Arguments, Entry]]:
    """Decorator, see the module. The function's arguments are positional. space: None for `others`."""

    def declare(select: Callable[Arguments, Entry]) -> Callable[Arguments, Entry]:
        return cast(Callable[Arguments, Entry], Tunable(select, others, space or others))

    return declare


def selection(select: Callable[Arguments, Pick], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Selection:
    """`Tunable.selection` of a decorated function."""
    assert isinstance(select, Tunable)
    assert not kwargs
    return select.selection(*args)


def recorded(entry: Pick) -> dict[str, Any] | None:
    """For JSON."""
    return None if entry is None else {**asdict(entry), "tiles": dict(entry.tiles)}


def entry_of(record: dict[str, Any] | None) -> Pick:
    """Of what `recorded` gave; TypeError for what it did not give."""
    return None if record is None else Launch(**record)


def described(entry: Pick) -> str:
    """In words."""
    return "no entry" if entry is None else str(entry)


def pick(launches: Mapping[str, Pick]) -> None:
    """Run these selections by these entries from now on."""
    PICKED.update(launches)


@contextlib.contextmanager
def picked(launches: Mapping[str, Pick]) -> Iterator[None]:
    """Exactly these entries instead of the tables' inside."""
    before = dict(PICKED)
    PICKED.clear()
    pick(launches)
    try:
        yield
    finally:
        PICKED.clear()
        PICKED.update(before)


@contextlib.contextmanager
def selections() -> Iterator[dict[str, Selection]]:
    """What is selected inside, by name; the mapping is filled at the end."""
    seen: dict[str, tuple[Tunable, tuple[Any, ...]]] = {}
    found: dict[str, Selection] = {}
    _watching.append(seen)
    try:
        yield found
    finally:
        _watching.remove(seen)
        found |= {name: function.selection(*args) for name, (function, args) in seen.items()}


def _distinct(entries: Iterable[Pick]) -> list[Pick]:
    found: list[Pick] = []
    for entry in entries:
        if entry not in found:
            found.append(entry)
    return found
