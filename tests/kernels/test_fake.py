"""Each op is its own fake implementation: on tensors without data it gives what it gives on data, but the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deitfast.kernels.attention_op import attention
from deitfast.kernels.catalogue import Draw
from deitfast.kernels.common import has_data, runs_triton
from deitfast.kernels.image_ops import CODES, image_ops
from deitfast.kernels.input import input_patches
from deitfast.kernels.loss import mixed_bce, mixed_cross_entropy
from deitfast.kernels.patch_embed_op import patch_embed
from tests.kernels.linear_ops import HALVES, OPS

DRAW = Draw(0, torch.float16)
Call = tuple[Any, tuple[Any, ...], Any]
"""An op of ours, its arguments, its results."""


class OurCalls(TorchDispatchMode):
    """The calls of our ops, forward and backward, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "deitfast":
            assert not kwargs
            self.calls.append((func, args, results))
        return results


def _linear(name: str, **changes: Any) -> Tensor:
    op = (OPS | HALVES)[name]
    inputs = op.inputs(DRAW, (3, 5), 64, 48) | {
        name: x for name, x in changes.items() if name in ("gamma", "path_scale")
    }
    leaves = {name: x if x is None else x.requires_grad_(name != "path_scale") for name, x in inputs.items()}
    return op.function(**leaves | changes, **op.options)


def _losses(loss: Callable[..., Tensor], *smoothing: float) -> Tensor:
    labels = torch.tensor([1, 2])
    return loss(DRAW.normal(2, 7).requires_grad_(), labels, labels.flip(0), torch.rand(2), *smoothing)


def _input(mixes: bool) -> Tensor:
    images, box = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.tensor([[1, 2, 5, 6], [0, 0, 0, 0]])
    index, options = torch.arange(2), {"mean": (0.5,) * 3, "std": (0.2,) * 3, "dtype": torch.float16}
    return input_patches(
        images, box, box, torch.rand(2), index, index, index[1:], seed=5, patch_size=8, mixes=mixes, **options
    )


def _image_ops() -> Tensor:
    plan = torch.zeros(2, 1, 8, dtype=torch.float64)
    plan[..., 0], plan[..., 2], plan[0, 0, 1] = CODES["brightness"], 0.5, 1
    return image_ops(torch.zeros(1, 6, 7, 3, dtype=torch.uint8), plan, (1, 2, 3))


def _patch_embed() -> Tensor:
    weight, bias, prefix, pos = DRAW.normal(16, 12), DRAW.normal(16), DRAW.normal(2, 16), DRAW.normal(6, 16)
    return patch_embed(DRAW.normal(3, 4, 12), *(x.requires_grad_() for x in (weight, bias, prefix, pos)))


subset = {"subset": torch.tensor([0, 2]), "subset_scale": 1.5, "path_scale": None}
USES: dict[str, Callable[[], Tensor]] = {
    "attention": lambda: attention(DRAW.normal(2, 5, 3 * 64).requires_grad_(), 2),
    "image_ops": _image_ops,
    "input_patches": lambda: _input(mixes=True),
    "input_patches unmixed": lambda: _input(mixes=False),
    "layernorm_attention": lambda: _linear("layernorm_attention", num_heads=2),
    "layernorm_attention, a subset": lambda: _linear("layernorm_attention", num_heads=2, **subset),
    "layernorm_mlp": lambda: _linear("layernorm_mlp"),
    "layernorm_mlp, a subset": lambda: _linear("layernorm_mlp", **subset),
    "layernorm_mlp, a subset, computed again": lambda: _linear("layernorm_mlp", **subset, recompute=True),
    "layernorm_mlp, no gamma": lambda: _linear("layernorm_mlp", gamma=None, path_scale=None),
    "layernorm_qkv": lambda: _linear("layernorm_qkv"),
    "linear_residual": lambda: _linear("linear_residual"),
    "mixed_bce": lambda: _losses(mixed_bce),
    "mixed_cross_entropy": lambda: _losses(mixed_cross_entropy, 0.1),
    "mlp_gelu": lambda: _linear("mlp_gelu"),
    "patch_embed": _patch_embed,
}


def our_calls(use: Callable[[], Tensor]) -> list[Call]:
    with OurCalls() as seen:
        out = use()
        if out.requires_grad:
            out.float().sum().backward()
    return seen.calls


def described(results: Any) -> list[tuple[Any, ...]]:
    return [(x.shape, x.stride(), x.dtype) for x in tree_leaves(results)]


CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.backends.cuda.is_built(), reason="indexing a fake CUDA tensor needs torch with CUDA"
    ),
)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_without_data_an_op_gives_the_same_shapes_strides_and_dtypes(use: str, device: str) -> None:
    """In the interpreter the results compared are the kernels' own."""

    def without_data(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    for op, arguments, results in our_calls(USES[use]):
        with torch.no_grad(), FakeTensorMode():
            found = op(*tree_map_only(Tensor, without_data, arguments))
        assert described(found) == described(results), op
        assert {x.device.type for x in tree_leaves(found)} == {device}
        assert all(isinstance(x, FakeTensor) for x in tree_leaves(found))


def test_every_op_is_used_above() -> None:
    called = {op._schema.name for use in USES.values() for op, _, _ in our_calls(use)}
    assert called == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("deitfast::")}


def test_tensors_without_data_launch_nothing() -> None:
    with FakeTensorMode():
        fake = torch.empty(2, device="cuda")
    for x in (fake, torch.empty(2, device="meta")):
        assert not has_data(x)
        assert not runs_triton(x)
    assert has_data(torch.empty(2))
