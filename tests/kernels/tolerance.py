"""The rule by which the product judges its kernels (`deitfast.verification.judgement`), as an assertion for tests.

The rule is shared; what it is given here, the definitions in float64, are the tests' own.
"""

from __future__ import annotations

from torch import Tensor

from deitfast.verification.judgement import problem


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

    Arguments as of `problem`; atol is its slack.
    """
    tensors = [None if x is None else x.detach().cpu() for x in (actual, reference64, eager, magnitude)]
    on_cpu, exact, expected, scale = tensors
    assert on_cpu is not None
    assert exact is not None
    assert expected is not None
    why = problem(name, on_cpu, exact, expected, factor, atol, scale)
    assert not why, why
