"""Which ops run as eager PyTorch although their kernels could: those that were found wrong, or slower, on this GPU.

The choice holds for the process, as its GPU does. It is made before anything is captured or compiled; a CUDA graph and
what torch.compile made keep the form that they saw.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Arguments = ParamSpec("Arguments")

OURS, EAGER, CUDNN = "ours", "eager", "eager, attention by cuDNN"
"""The forms of an op: its kernels; PyTorch, which picks the attention; PyTorch with cuDNN's attention."""

CHOSEN: dict[str, str] = {}
"""Op -> its form; an op that is not in it runs its kernels."""


def choose(forms: Mapping[str, str]) -> None:
    """Run these ops in these forms from now on; an op that once ran otherwise than by its kernels goes on so."""
    CHOSEN.update({name: form for name, form in forms.items() if form != OURS})


@contextlib.contextmanager
def chosen(**forms: str) -> Iterator[None]:
    """Exactly these ops in these forms inside."""
    before = dict(CHOSEN)
    CHOSEN.clear()
    choose(forms)
    try:
        yield
    finally:
        CHOSEN.clear()
        CHOSEN.update(before)


def replaceable(
    eager: Callable[Arguments, Tensor],
) -> Callable[[Callable[Arguments, Tensor]], Callable[Arguments, Tensor]]:
    """Decorator of a public op: where its name is in CHOSEN, `eager` is called with its arguments instead.

    Operands of several dtypes, which the kernels take and PyTorch does not, run under autocast in the 16-bit one.
    """

    def declare(op: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
        name = op.__name__

        @functools.wraps(op)
        def of_form(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
            form = CHOSEN.get(name)
            if form is None:
                return op(*args, **kwargs)
            with _lowest_dtype(*args, *kwargs.values()):
                if form == CUDNN:
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                        return eager(*args, **kwargs)
                return eager(*args, **kwargs)

        return of_form

    return declare


def _lowest_dtype(*values: object) -> contextlib.AbstractContextManager[object]:
    """Autocast where fp32 stands beside one 16-bit dtype in matrices, and nobody has switched it on."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    device = tensors[0].device.type
    dtypes = {x.dtype for x in tensors if x.is_floating_point() and x.ndim > 1}
    low = dtypes - {torch.float32, torch.float64}
    if len(dtypes) < 2 or len(low) != 1 or torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, low.pop())
