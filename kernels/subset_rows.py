"""Drop-path that skips the compute: which rows of a tensor (B * n, D) belong to the samples of a branch; no op.

A branch that runs for K of its B samples works on K * n compact rows inside. What it shares with the rest of the model
(x, out and their gradients) keeps all B * n rows; the kernels at either end find theirs through the samples' indices:

    row r of the branch is row subset[r // n] * n + r % n of the batch

so no tensor is gathered by a pass of its own, and shapes depend on K alone. Rows of other samples have out = x and
dx = dout: the LayerNorm kernels copy them while they are there. subset ascends, so subset[i] - i samples before sample
subset[i] are others, and the j-th other is j plus the number of i with subset[i] - i <= j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import check_last_contiguous


def add_subset(
    x: Tensor, subset: Tensor, scale: float, branch: Callable[[Tensor], Tensor], gamma: Tensor | None = None
) -> Tensor:
    """The definition in eager PyTorch: x (B, ..., D) plus scale * gamma * branch for the samples `subset` alone."""
    out = branch(x[subset])
    out = out if gamma is None else out * gamma
    return x.index_add(0, subset, out.to(x.dtype), alpha=scale)


@dataclass(frozen=True)
class SubsetRows:
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


def subset_rows(x: Tensor, subset: Tensor | None, scale: float) -> SubsetRows | None:
    """The rows of x (B, ..., D) that `subset` names; None for None."""
    return None if subset is None else SubsetRows(subset, scale, x.shape[1:-1].numel())


def branch_rows(x: Tensor, subset: SubsetRows | None) -> int:
    """How many rows of x (M, D) a branch works on: the subset's, or all."""
    return x.shape[0] if subset is None else subset.row_count


def check_subset(op: str, x: Tensor, path_scale: Tensor | None, subset: Tensor | None, subset_scale: float) -> None:
    """Raise unless subset (K,), or None, can index the samples of x (B, ..., D). Its values are not read."""
    if subset is None:
        if subset_scale != 1.0:
            raise ValueError(f"{op}: subset_scale is {subset_scale} but subset is None; give the subset's indices")
        return
    if path_scale is not None:
        raise ValueError(f"{op}: path_scale and subset are two forms of drop-path; give one of them")
    if x.ndim < 2:
        raise ValueError(f"{op}: subset needs a batch dimension, but x has shape {tuple(x.shape)}")
    if subset.ndim != 1 or subset.shape[0] > x.shape[0]:
        raise ValueError(f"{op}: subset has shape {tuple(subset.shape)}, expected (K,) with K <= {x.shape[0]} samples")
    check_last_contiguous(op, "subset", subset)
    if subset.dtype != torch.int64:
        raise TypeError(f"{op}: subset is {subset.dtype}, expected torch.int64")
    if subset.device != x.device:
        raise ValueError(f"{op}: subset is on {subset.device} but x on {x.device}; move one of them")


@triton.jit
def subset_row(row, subset, rows_per_sample, mask):
    """The row of the batch, int64, that row `row` of the branch is, int32 (to divide 64 bits costs a call)."""
    nth = row // rows_per_sample
    return (tl.load(subset + nth, mask=mask, other=0) - nth) * rows_per_sample + row


@triton.jit
def copy_other_rows(
    source,  # (B * rows_per_sample, D)
    target,  # (B * rows_per_sample, D), contiguous
    subset,  # (K,) int64
    first,  # of BLOCK_M rows to copy, among those of the other samples
    stride_source,
    rows,  # of all other samples
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
        missing = tl.load(subset + i, mask=i < K, other=0) - i
        sample += tl.sum(((i < K)[None, :] & (missing[None, :] <= nth[:, None])).to(tl.int32), 1)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    moved = sample * rows_per_sample + row % rows_per_sample
    values = tl.load(source + moved[:, None] * stride_source + column[None, :], mask=mask)
    tl.store(target + moved[:, None] * D + column[None, :], values, mask=mask)
