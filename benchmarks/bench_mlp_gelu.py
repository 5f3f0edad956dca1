"""The MLP with exact GELU, beside eager and torch.compile.

python -m benchmarks.bench_mlp_gelu [--device cpu --quick] [--out FILE] [--minutes 8]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import micro


def main(argv: Sequence[str] | None = None) -> int:
    return micro.main(["mlp_gelu"], "mlp_gelu", argv)


if __name__ == "__main__":
    sys.exit(main())
