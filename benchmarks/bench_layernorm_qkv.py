"""LayerNorm with the qkv projection, and LayerNorm alone, beside eager, torch.compile and Liger's LayerNorm.

python -m benchmarks.bench_layernorm_qkv [--device cpu --quick] [--out FILE] [--minutes 8]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import micro


def main(argv: Sequence[str] | None = None) -> int:
    return micro.main(["layernorm_qkv", "layernorm"], "layernorm_qkv", argv)


if __name__ == "__main__":
    sys.exit(main())
