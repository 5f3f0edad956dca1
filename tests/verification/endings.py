"""Work that ends its process as it is told to; it imports next to nothing, so that the process begins at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    print("a library's banner")
    if job["end"] == "at once":
        raise SystemExit("no CUDA-capable device is detected")
    yield {"answer": job["end"]}
    if job["end"] == "killed":
        os.abort()
    if job["end"] == "hangs":
        time.sleep(600)
