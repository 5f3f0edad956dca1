"""How exact the products are that are left to cuBLAS."""

from __future__ import annotations

import torch


def sum_in_fp32() -> None:
    """From now on in this process cuBLAS adds the parts of a bf16 product in fp32; torch's default lets it round them.

    A weight gradient is a sum over every token of a batch, 100,864 for 512 images, which cuBLAS computes in parts.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
