"""The way in, uint8 images to patches and patches to tokens, beside eager and torch.compile.

python -m benchmarks.bench_input [--device cpu --quick] [--out FILE] [--minutes 8]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import micro


def main(argv: Sequence[str] | None = None) -> int:
    return micro.main(["input_patches", "patch_embed"], "input", argv)


if __name__ == "__main__":
    sys.exit(main())
