"""Every planted fault of an op is found, told in words, and nothing is said of an op that is right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deitfast.kernels.catalogue import Draw, Shape, Tensors
from deitfast.kernels.gradient_free import GRADIENT_FREE
from deitfast.kernels.replaced import EAGER, OURS, chosen
from deitfast.verification import case as checking
from deitfast.verification.arena import GUARD, Arena
from deitfast.verification.case import Case
from deitfast.verification.check import check
from deitfast.verification.timing import fastest
from deitfast.verification.verify import OPS
from tests.verification.planted import FAULTS

SHAPE = Shape(width=64, heads=1, tokens=17, batch=8, patch_size=4, classes=10)
CPU = torch.device("cpu")
USED = ("input_patches", "patch_embed", "layernorm_attention", "layernorm_mlp", "mixed_cross_entropy", "mixed_bce")


def verdict(name: str, function: Any = None, **of_case: Any) -> Any:
    op = OPS[name] if function is None else replace(OPS[name], function=function)
    return check(op, SHAPE, torch.float32, CPU, seed=3, **{"backward": True, **of_case})


@pytest.mark.parametrize(
    "of_case",
    [{}, {"without": frozenset({"gamma", "path_scale"})}, {"subset": 4}, {"backward": False}],
    ids=["whole", "without", "subset", "forward"],
)
@pytest.mark.parametrize("name", USED)
def test_nothing_is_said_of_an_op_that_is_right(name: str, of_case: dict[str, Any]) -> None:
    found = verdict(name, **of_case)
    assert (found.form, found.why) == (OURS, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GRADIENT_FREE)
def test_nothing_is_said_of_an_op_without_gradients_that_is_right(name: str, dtype: torch.dtype) -> None:
    found = check(OPS[name], SHAPE, dtype, CPU, seed=3, backward=True)
    assert (found.form, found.why) == (OURS, "")


def off_by_one(out: Tensor) -> Tensor:
    out = out.clone()
    out[-1, -1, -1, -1] ^= 1
    return out


def test_an_image_that_is_off_by_one_is_found() -> None:
    found = verdict("image_ops", lambda **arguments: off_by_one(OPS["image_ops"].function(**arguments)))
    assert found.form == EAGER
    assert found.why == "output: 1 of 19,968 values are not the reference's"


def last_weight_is_wrong(found: Tensors) -> None:
    found["master"][-1] *= 1.01


def copy_is_not_written(found: Tensors) -> None:
    found["compute"][-1] = math.nan


def infinite_gradient_is_applied(found: Tensors) -> None:
    found["skipped"] -= 1


def first_moment_is_rounded(found: Tensors) -> None:
    found["exp_avg"].copy_(found["exp_avg"].bfloat16())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (last_weight_is_wrong, "master: largest error"),
        (copy_is_not_written, "compute: 1 values are not finite"),
        (infinite_gradient_is_applied, "skipped: 1 of 1 values are not the reference's"),
        (first_moment_is_rounded, "exp_avg: largest error"),
    ],
)
def test_an_update_with_a_fault_is_found(fault: Callable[[Tensors], None], told: str) -> None:
    def wrong(**arguments: Any) -> Tensors:
        found: Tensors = OPS["adamw"].function(**arguments)
        fault(found)
        return found

    found = check(replace(OPS["adamw"], function=wrong), SHAPE, torch.bfloat16, CPU, seed=3, backward=True)
    assert found.form == EAGER
    assert found.why.startswith(told), found.why


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["layernorm_mlp", "input_patches"])
def test_a_planted_fault_is_found(name: str, fault: str) -> None:
    make, told = FAULTS[fault]
    broken = make()
    found = verdict(name, lambda **arguments: broken(OPS[name].function(**arguments)))
    assert found.form == EAGER
    assert re.search(told, found.why), found.why
    assert "\n" not in found.why


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dout: Tensor) -> Tensor:
        wrong = dout[0].clone()
        wrong[..., -1] *= 2
        return wrong


def test_a_fault_of_the_backward_alone_is_found() -> None:
    function = OPS["layernorm_mlp"].function
    found = verdict("layernorm_mlp", lambda **arguments: _WrongGradient.apply(function(**arguments)))
    assert found.form == EAGER
    assert "gradient of" in found.why


def test_a_read_beside_an_operand_and_a_changed_input_are_found() -> None:
    function = OPS["patch_embed"].function

    def reads_beside(bias: Tensor, **arguments: Tensor) -> Tensor:
        return function(bias=bias.as_strided(bias.shape, (1,), bias.storage_offset() + 1), **arguments)

    def changes_its_input(bias: Tensor, **arguments: Tensor) -> Tensor:
        out = function(bias=bias, **arguments)
        bias.detach()[0] += 1
        return out

    without_bands = verdict("patch_embed", backward=False)
    assert not without_bands.why
    assert "not finite" in verdict("patch_embed", reads_beside, backward=False).why
    assert verdict("patch_embed", changes_its_input, backward=False).why == "it changes its input bias"


@pytest.mark.parametrize("subset", [0, 4])
@pytest.mark.parametrize("name", ["layernorm_attention", "patch_embed", "input_patches"])
def test_float64_in_parts_of_the_batch_is_float64_of_the_whole(
    name: str, subset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.draw(OPS[name], SHAPE, Draw(0, torch.float32), backward=True, subset=subset)
    whole = case.exact()
    monkeypatch.setattr(checking, "_CHUNK", 2 * SHAPE.tokens * SHAPE.width)
    parts = case.exact()
    assert whole.keys() == parts.keys()
    for key, x in whole.items():
        torch.testing.assert_close(parts[key], x, rtol=1e-10, atol=1e-10)


def test_an_op_that_memory_does_not_suffice_for_is_asked_of_half_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    function = OPS["layernorm_mlp"].function

    def large(x: Tensor, **arguments: Tensor) -> Tensor:
        asked.append(len(x))
        if len(x) > SHAPE.batch // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(x=x, **arguments)

    assert verdict("layernorm_mlp", large).form == OURS
    assert set(asked) == {SHAPE.batch, SHAPE.batch // 2}


def test_an_arena_keeps_strides_and_sees_what_is_written_on_either_side() -> None:
    for offset in (None, -1, 6):
        arena = Arena(CPU)
        like = torch.arange(6.0).view(2, 3).t()
        placed = arena.place(like)
        assert placed.stride() == like.stride()
        assert torch.equal(placed, like)
        assert placed.data_ptr() % 16 == 0
        if offset is not None:
            placed.as_strided((1,), (1,), GUARD // 4 + offset).zero_()
        assert arena.touched() == (offset is not None)


def test_in_an_arena_tensors_that_nothing_wrote_are_nan_and_the_rest_is_as_usual() -> None:
    x = torch.ones(2, 3)
    with Arena(CPU).allocating():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(x, dtype=torch.bfloat16).isnan().all()
        assert x.new_empty((2, 2)).isnan().all()
        assert not torch.zeros(2, 3).any()
        assert not x.new_zeros(4).any()
        assert torch.empty(2, dtype=torch.bool).dtype == torch.bool
        assert torch.empty(0).shape == (0,)
    assert not torch.zeros(3).isnan().any()


@pytest.mark.parametrize(
    ("ours", "eager", "best"),
    [([1.0, 1.1, 1.0], [0.5, 0.6, 0.5], "eager"), ([1.0, 1.1, 1.0], [0.95, 1.0, 0.95], "ours"), ([1.0], [1.0], "ours")],
)
def test_another_form_wins_beyond_noise_alone_and_ties_are_ours(
    ours: list[float], eager: list[float], best: str
) -> None:
    assert fastest({"ours": ours, "eager": eager}, "ours") == best


@pytest.mark.parametrize("name", USED)
def test_a_replaced_op_gives_what_it_gave_and_the_gradients(name: str) -> None:
    case = Case.draw(OPS[name], SHAPE, Draw(0, torch.float32), backward=True)
    ours = case.run(OPS[name].function)
    with chosen(**{name: EAGER}):
        eager = case.run(OPS[name].function)
    for key, x in ours.items():
        torch.testing.assert_close(eager[key], x, rtol=1e-4, atol=1e-4)


def test_a_replaced_op_takes_an_fp32_stream_beside_16_bit_weights() -> None:
    case = Case.draw(OPS["layernorm_mlp"], SHAPE, Draw(0, torch.float32), backward=True)
    low = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    mixed = {name: x.bfloat16() if name in low else x for name, x in case.tensors.items()}
    ours = case.run(OPS["layernorm_mlp"].function, mixed)
    with chosen(layernorm_mlp=EAGER):
        eager = case.run(OPS["layernorm_mlp"].function, mixed)
    for key, x in ours.items():
        assert eager[key].dtype == x.dtype, key
    torch.testing.assert_close(eager["output"], ours["output"], rtol=0.05, atol=0.05)
