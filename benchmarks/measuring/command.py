"""What every command of this folder starts with: its options, its device, and products that mean what they say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from deitfast.compiler import check_compiler
from deitfast.errors import DeitfastError


def arguments(parser: argparse.ArgumentParser, minutes: float = 8.0) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that everything runs, not how fast")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON, rewritten after every row")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"wall time (default {minutes:g})")


def ready(program: str, device: str) -> bool:
    """Whether the device and what its kernels need is there; says so where it is not. fp32 is fp32 from here on."""
    fp32_is_fp32()
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{program}: no CUDA device; --device cpu --quick rehearses on CPU", file=sys.stderr)
        return False
    try:
        if device == "cuda":
            check_compiler()
    except DeitfastError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return False
    return True


def fp32_is_fp32() -> None:
    """No TF32 in this process: by default cuDNN rounds the operands of fp32 convolutions to 10 bits, the patch
    embedding's among them, and what is compared with eager fp32 would be compared with that."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
