"""A board of small messages between the processes, over the TCP store they joined by: no device, no collective."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_numbers = itertools.count()


class Board:
    """Texts by key. One object is for one thread: a waiting call blocks the others of its connection."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def another(self) -> Board:
        """The same board over a connection of its own."""
        return Board(self._store.clone())

    def post(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def read(self, key: str) -> str | None:
        """What is posted there; None where nothing is."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def wait(self, key: str, seconds: float) -> str:
        """What is posted there, once it is. Raises torch.distributed.DistStoreError after `seconds`."""
        self._store.wait([key], timedelta(seconds=seconds))
        return self._store.get(key).decode()

    def remove(self, key: str) -> None:
        self._store.delete_key(key)


def board() -> Board | None:
    """An empty board for the processes that have joined, None for one that is alone; all call this in the same order.

    What a run before it on the same processes posted, or this one before it was rolled back, is not on it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Board(dist.PrefixStore(f"deitfast/board/{next(_numbers)}", distributed_c10d._get_default_store()))
