"""The whole fused block and its other ops, beside eager and torch.compile.

python -m benchmarks.bench_block_ops [--device cpu --quick] [--out FILE] [--minutes 8]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import micro


def main(argv: Sequence[str] | None = None) -> int:
    return micro.main(["block", "layernorm_mlp", "linear_residual"], "block_ops", argv)


if __name__ == "__main__":
    sys.exit(main())
