"""Images that turn out unreadable in the middle of a run: named once, counted, and replaced by others.

The replacement of image j is the first readable one of a chain of images that hashes of (seed, j) name. Whether an
image is readable depends on its file alone (a manifest knows its bytes), so every process finds the same replacement,
and so does a resumed run, whatever each of them has met before. The label is the replacement's, and so are the draws;
all other samples keep their order and draws.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deitfast.data.manifest import Manifest, checksum
from deitfast.data.philox import REPLACEMENT, counter, philox4x32
from deitfast.errors import DeitfastError
from deitfast.files import cache_folder

_NAMED = 10  # told by name; the rest is in the list
_LONGEST_CHAIN = 100


class TooManyBadFiles(DeitfastError):
    """More images of a split became unreadable during the run than the recipe allows."""


class Quarantine:
    """The unreadable images of a manifest as far as this process has met them. Any number of threads may use it.

    limit: images beyond which `check` raises. listing: file that gets a line for each, with the reason; None: one in
    the cache folder.
    """

    def __init__(
        self, manifest: Manifest, seed: int, limit: float, say: Callable[[str], None], listing: Path | None = None
    ) -> None:
        self.manifest, self.seed, self.limit, self.say = manifest, seed, limit, say
        key = f"{checksum(manifest.root.encode(errors='surrogateescape')):016x}"
        self.listing: Path | None = listing or cache_folder("unreadable") / f"{key}.txt"
        self._reasons: dict[int, str] = {}  # in the order in which they were met
        self._by_pil: set[int] = set()  # whole, but not to DALI
        self._told = 0
        self._lock = threading.Lock()

    @property
    def files(self) -> list[tuple[str, str]]:
        """(name, reason) of each unreadable image met so far."""
        with self._lock:
            return [(self.manifest.name(i), reason) for i, reason in self._reasons.items()]

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, i: int, reason: str) -> None:
        with self._lock:
            self._reasons.setdefault(i, reason)

    def decode_by_pil(self, i: int) -> None:
        """From now on image i is decoded by PIL, because DALI cannot."""
        with self._lock:
            self._by_pil.add(i)

    @property
    def by_pil(self) -> int:
        """Images that PIL decodes because DALI cannot."""
        return len(self._by_pil)

    def read(self, i: int) -> np.ndarray | None:
        """The bytes of image i for DALI; None, and quarantined, if it is unreadable."""
        if i in self._reasons:
            return None
        try:
            return self.manifest.encoded(i, convert=i in self._by_pil)
        except DeitfastError as error:
            self.add(i, str(error))
            return None

    def resolve(self, index: np.ndarray) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """int64 (m,) image numbers with the unreadable ones replaced, and the bytes of each distinct one.

        Raises TooManyBadFiles where so long a chain is unreadable that the data must be gone.
        """
        stands_for: dict[int, int] = {}
        encoded: dict[int, np.ndarray] = {}
        for i in np.unique(index).tolist():
            stand_in = i
            for attempt in range(_LONGEST_CHAIN):
                data = encoded[stand_in] if stand_in in encoded else self.read(stand_in)
                if data is not None:
                    break
                stand_in = self._link(i, attempt)
            else:
                raise TooManyBadFiles(
                    f"{_LONGEST_CHAIN} images in a row of {self.manifest.root} are unreadable, "
                    f"{self.manifest.name(stand_in)} among them. Is the data still there?"
                )
            stands_for[i], encoded[stand_in] = stand_in, data
        return np.array([stands_for[i] for i in index.tolist()], np.int64), encoded

    def _link(self, i: int, attempt: int) -> int:
        """Link number `attempt` of the chain of image i."""
        words = philox4x32(np.array([i]), np.array([attempt]), np.zeros(1, np.int64), counter(REPLACEMENT), self.seed)
        return int(words[0][0] * len(self.manifest) >> 32)

    def tell(self) -> None:
        """Say and list the names that are new since the last call."""
        if len(self) == self._told:
            return
        new = self.files[self._told :]
        if self.listing is not None:
            try:
                self.listing.parent.mkdir(parents=True, exist_ok=True)
                with open(self.listing, "a") as f:
                    f.writelines(f"{name}\t{' '.join(reason.split())}\n" for name, reason in new)
            except OSError as error:
                self.say(f"cannot write {self.listing}: {error.strerror}. Unreadable images are not listed there")
                self.listing = None
        for _, reason in new[: max(_NAMED - self._told, 0)]:
            self.say(f"unreadable, not used from now on: {reason}")
        if self._told < _NAMED < self._told + len(new):
            self.say(f"more than {_NAMED} images became unreadable; all of them are in {self.listing}")
        self._told += len(new)

    def check(self) -> None:
        """Raise TooManyBadFiles beyond the limit."""
        if len(self) > self.limit:
            where = f"listed in {self.listing}, " if self.listing else ""
            raise TooManyBadFiles(
                f"{len(self)} of {len(self.manifest)} images of {self.manifest.root} became unreadable in the run, "
                f"{where}the first {self.files[0][0]}. Mend them, or raise --bad-limit"
            )
