"""Drop-path that skips the compute: which rows of a tensor (B * n, D) belong to the samples that a branch keeps; no op.

A branch that runs for K of its B samples works on K * n compact rows inside. What it shares with the rest of the model
(x, out and their gradients) keeps all B * n rows; the kernels at either end find theirs through the samples' indices:

    row r of the branch is row kept[r // n] * n + r % n of the batch

so no tensor is gathered by a pass of its own, and shapes depend on K alone. Rows of samples that are not kept have
out = x and dx = dout: the LayerNorm kernels copy them while they are there. kept ascends, so kept[i] - i samples before
sample kept[i] are not kept, and the j-th sample that is not kept is j plus the number of i with kept[i] - i <= j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import check_last_contiguous


def add_kept(
    x: Tensor, kept: Tensor, scale: float, branch: Callable[[Tensor], Tensor], gamma: Tensor | None = None
) -> Tensor:
    """The definition in eager PyTorch: x (B, ..., D) plus scale * gamma * branch for the samples `kept` alone."""
    out = branch(x[kept])
    out = out if gamma is None else out * gamma
    return x.index_add(0, kept, out.to(x.dtype), alpha=scale)


@dataclass(frozen=True)
class KeptRows:
    """The samples that a branch runs for, and the factor of the branch."""

    samples: Tensor  # (K,) int64, ascending and distinct
    scale: float
    rows_per_sample: int

    @property
    def row_count(self) -> int:
        """Rows of the branch."""
        return self.samples.shape[0] * self.rows_per_sample

    def numbers(self) -> Tensor:
        """The row of the batch that each row of the branch is, (row_count,) int64; for the eager implementations."""
        within = torch.arange(self.rows_per_sample, device=self.samples.device)
        return (self.samples[:, None] * self.rows_per_sample + within).flatten()


def kept_rows(x: Tensor, kept: Tensor | None, scale: float) -> KeptRows | None:
    """The rows of x (B, ..., D) that `kept` names; None for None."""
    return None if kept is None else KeptRows(kept, scale, x.shape[1:-1].numel())


def check_kept(op: str, x: Tensor, keep: Tensor | None, kept: Tensor | None, kept_scale: float) -> None:
    """Raise unless kept (K,), or None, can index the samples of x (B, ..., D). Its values are on the device, unread."""
    if kept is None:
        if kept_scale != 1.0:
            raise ValueError(f"{op}: kept_scale is {kept_scale} but kept is None; give the indices of the samples kept")
        return
    if keep is not None:
        raise ValueError(f"{op}: keep and kept are two forms of drop-path; give one of them")
    if x.ndim < 2:
        raise ValueError(f"{op}: kept needs a batch dimension, but x has shape {tuple(x.shape)}")
    if kept.ndim != 1 or kept.shape[0] > x.shape[0]:
        raise ValueError(f"{op}: kept has shape {tuple(kept.shape)}, expected (K,) with K <= {x.shape[0]} samples")
    check_last_contiguous(op, "kept", kept)
    if kept.dtype != torch.int64:
        raise TypeError(f"{op}: kept is {kept.dtype}, expected torch.int64")
    if kept.device != x.device:
        raise ValueError(f"{op}: kept is on {kept.device} but x on {x.device}; move one of them")


@triton.jit
def kept_row(row, kept, rows_per_sample, mask):
    """The row of the batch that row `row` of the branch is, int64; kept (K,) int64."""
    return tl.load(kept + row // rows_per_sample, mask=mask, other=0) * rows_per_sample + row % rows_per_sample


@triton.jit
def copy_rows_not_kept(
    source,  # (B * rows_per_sample, D)
    target,  # (B * rows_per_sample, D), contiguous
    kept,  # (K,) int64
    first,  # of BLOCK_M rows to copy, among those of the samples that are not kept
    stride_source,
    rows,  # of all samples that are not kept
    K,
    D,
    rows_per_sample,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK_K: tl.constexpr = 128
    row = first + tl.arange(0, BLOCK_M)
    nth = row // rows_per_sample
    sample = nth.to(tl.int64)
    for start in tl.range(0, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        missing = tl.load(kept + i, mask=i < K, other=0) - i
        sample += tl.sum(((i < K)[None, :] & (missing[None, :] <= nth[:, None])).to(tl.int32), 1)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    moved = sample * rows_per_sample + row % rows_per_sample
    values = tl.load(source + moved[:, None] * stride_source + column[None, :], mask=mask)
    tl.store(target + moved[:, None] * D + column[None, :], values, mask=mask)
