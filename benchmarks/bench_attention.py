"""Attention from packed qkv, beside eager, torch.compile, every SDPA backend and flash-attn.

    python -m benchmarks.bench_attention [--device cpu --quick] [--out FILE] [--minutes 8]

The SDPA baselines take the same packed tensor and give the same layout, so that they pay for the views and copies that
a block around them pays for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import micro


def main(argv: Sequence[str] | None = None) -> int:
    return micro.main(["attention"], "attention", argv)


if __name__ == "__main__":
    sys.exit(main())
