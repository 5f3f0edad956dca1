"""How the kernel tests judge a result: by its distance from float64, set against eager PyTorch's in the same dtype.

Two distances must both hold, because each is blind where the other sees. The largest absolute error finds a single
wrong element (a row past the end, a block written twice); the 2-norm of the error finds a loss of precision all over
that hides below the rounding of one outlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATOL = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Default slack as a fraction of the reference's magnitude: half an ulp in the 16-bit dtypes, eight ulp in fp32.

Needed where eager happens to be exact (a row of one token), or where its error is luckily small.
"""


def assert_close_to_float64(
    name: str,
    actual: Tensor,
    reference64: Tensor,
    eager: Tensor,
    factor: float,
    atol: float | None = None,
    magnitude: Tensor | None = None,
) -> None:
    """Fail unless `actual` is at most `factor` times as far from `reference64` as `eager` is, plus a little.

    actual, eager: same shape and dtype; reference64: same shape, float64.
    factor: 2 for outputs, 3 for gradients.
    atol: slack as a fraction of the magnitude of `reference64`; default `ATOL` of the dtype.
    magnitude: tensor whose size scales the slack instead of `reference64`, for a result that cancels to about
        zero (the gradient of q where there is one key: give the gradient of the whole qkv).
    """
    assert actual.shape == reference64.shape == eager.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(reference64.shape)}, {tuple(eager.shape)} differ"
    )
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager {eager.dtype}"
    assert reference64.dtype == torch.float64, f"{name}: the reference is {reference64.dtype}"
    if actual.numel() == 0:
        return
    actual64, eager64, reference64 = (tensor.detach().cpu().double() for tensor in (actual, eager, reference64))
    assert actual64.isfinite().all(), f"{name}: {int((~actual64.isfinite()).sum())} values are not finite"
    slack = ATOL[actual.dtype] if atol is None else atol
    scale = reference64 if magnitude is None else magnitude.detach().cpu().double()
    for distance, order in (("largest", float("inf")), ("2-norm", 2.0)):
        error, allowed_error, size = (
            float(torch.linalg.vector_norm(tensor, ord=order))
            for tensor in (actual64 - reference64, eager64 - reference64, scale)
        )
        limit = factor * allowed_error + slack * size
        assert error <= limit, (
            f"{name}: {distance} error {error:.3e} exceeds {limit:.3e} = {factor} x eager's {allowed_error:.3e} "
            f"+ {slack:.1e} x magnitude {size:.3e} (shape {tuple(actual.shape)}, {actual.dtype})"
        )
