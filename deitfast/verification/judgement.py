"""When a result is right: by its distance from float64, set against eager PyTorch's in the same dtype.

Two distances must both hold, because each is blind where the other sees. The largest absolute error finds a single
wrong element (a row past the end, a block written twice); the 2-norm of the error finds a loss of precision all over
that hides below the rounding of one outlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT, GRADIENT = 2.0, 3.0
"""How many times as far from float64 as eager PyTorch's an output or a gradient may be."""

SLACK = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""And a little, as a fraction of the reference's magnitude: half an ulp in the 16-bit dtypes, eight ulp in fp32.

Needed where eager happens to be exact (a row of one token), or where its error is luckily small.
"""


def problem(
    name: str,
    actual: Tensor,
    reference64: Tensor,
    eager: Tensor,
    factor: float = OUTPUT,
    slack: float | None = None,
    magnitude: Tensor | None = None,
) -> str:
    """Why `actual` is not right, in words; empty where it is.

    It may be `factor` times as far from `reference64` as `eager` is, plus a little. Runs on the tensors' device.
    actual, eager: same shape and dtype; reference64: same shape, float64. Integers must be those of `reference64`.
    slack: fraction of the magnitude of `reference64`; default `SLACK` of the dtype.
    magnitude: tensor whose size scales the slack instead of `reference64`, for a result that cancels to about zero
        (the gradient of q where there is one key: give the gradient of the whole qkv).
    """
    if not actual.shape == reference64.shape == eager.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (actual, reference64, eager))
        return f"{name}: the shapes of result, reference and eager differ: {shapes}"
    if not actual.is_floating_point():
        wrong = int((actual != reference64).sum())
        return f"{name}: {wrong:,} of {actual.numel():,} values are not the reference's" if wrong else ""
    if actual.dtype != eager.dtype or reference64.dtype != torch.float64:
        return f"{name}: dtypes {actual.dtype}, {reference64.dtype}, {eager.dtype}; expected eager's, float64"
    if actual.numel() == 0:
        return ""
    actual64, eager64, scale = (
        x.detach().double() for x in (actual, eager, reference64 if magnitude is None else magnitude)
    )
    if not actual64.isfinite().all():
        return f"{name}: {int((~actual64.isfinite()).sum())} values are not finite"
    slack = SLACK[actual.dtype] if slack is None else slack
    for distance, order in (("largest", float("inf")), ("2-norm", 2.0)):
        error, eager_error, size = (
            float(torch.linalg.vector_norm(x, ord=order))
            for x in (actual64 - reference64, eager64 - reference64, scale)
        )
        limit = factor * eager_error + slack * size
        if not error <= limit:
            return (
                f"{name}: {distance} error {error:.3e} exceeds {limit:.3e} = {factor:g} x eager's {eager_error:.3e} "
                f"+ {slack:.1e} x magnitude {size:.3e} (shape {tuple(actual.shape)}, {actual.dtype})"
            )
    return ""
