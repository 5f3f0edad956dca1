"""What an op offers beside its launch table, and that what is picked instead is what runs, in the backward too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deitfast.kernels import attention_op, gemm, layernorm
from deitfast.kernels.attention_op import attention, attention_launch
from deitfast.kernels.common import INTERPRETED, Launch, Recorded, record
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp
from deitfast.kernels.tunable import PICKED, Pick, picked, selection, selections, tunable

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has launches of its own")

OWN, FIRST, SECOND = (Launch({"BLOCK": block}, 4, 2) for block in (1, 2, 3))


def _others(arch: int, width: int) -> Iterator[Pick]:
    yield from (OWN, FIRST, FIRST, None)


@tunable(_others, lambda arch, width: [SECOND, OWN])
def chosen_launch(arch: int, width: int) -> Launch | None:
    return OWN


def test_a_selection_is_named_by_its_arguments_and_offers_each_entry_once() -> None:
    found = selection(chosen_launch, 90, 7)
    assert found.name == "chosen_launch width=7"
    assert (found.own, found.others, found.space) == (OWN, (FIRST, None), (SECOND,))


def test_what_is_picked_runs_inside_alone_and_for_its_selection_alone() -> None:
    with picked({"chosen_launch width=7": FIRST}):
        assert chosen_launch(90, 7) is FIRST
        assert chosen_launch(80, 7) is FIRST
        assert chosen_launch(90, 8) is OWN
        with picked({"chosen_launch width=7": None}):
            assert chosen_launch(90, 7) is None
        assert chosen_launch(90, 7) is FIRST
    assert chosen_launch(90, 7) is OWN
    assert not PICKED


def _mlp(width: int) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

    x, norm = leaf(16, 197, width), {"ln_weight": leaf(width), "ln_bias": leaf(width)}
    fc1 = {"fc1_weight": leaf(4 * width, width), "fc1_bias": leaf(4 * width)}
    fc2 = {"fc2_weight": leaf(width, 4 * width), "fc2_bias": leaf(width)}
    out = layernorm_mlp(x, **norm, **fc1, **fc2, path_scale=torch.empty(16), residual=True)
    out.backward(torch.empty_like(out))


def launches_of(use: object, arch: int = 90) -> list[Recorded]:
    assert callable(use)
    with FakeTensorMode(), record(arch) as launches:
        use()
    return launches


def test_every_entry_that_an_op_offers_reaches_its_kernels() -> None:
    with selections() as found:
        before = launches_of(lambda: _mlp(768))
    assert {name.split()[0] for name in found} >= {"linear_launch", "layernorm_launch"}
    assert {name for name in found if "gelu" in name}, "the backward's product is selected, too"
    assert [x.entry for x in before] == [x.entry for x in launches_of(lambda: _mlp(768))]
    for name, offered in found.items():
        assert offered.own not in (*offered.others, *offered.space)
        for entry in (*offered.others[:2], *offered.space[-1:]):
            with picked({name: entry}):
                assert entry in [x.entry for x in launches_of(lambda: _mlp(768))], (name, entry)


def test_a_kernel_that_may_be_left_out_gives_way_to_the_other() -> None:
    def use() -> None:
        qkv = torch.empty(16, 197, 3 * 128, dtype=torch.bfloat16, requires_grad=True)
        attention(qkv, 2).backward(torch.empty(16, 197, 128, dtype=torch.bfloat16))

    short = selection(attention_launch, 90, "bwd_short", 2, 64)
    assert None in short.others
    with picked({short.name: None}):
        kernels = {x.kernel for x in launches_of(use)}
    assert attention_op.attention_bwd_dq_kernel in kernels
    assert attention_op.attention_bwd_short_kernel not in kernels


def test_programs_that_share_the_rows_are_part_of_an_entry() -> None:
    own = layernorm.layernorm_launch("bwd", 768, 2)
    assert own.programs
    fewer = replace(own, programs=7)
    with picked({selection(layernorm.layernorm_launch, "bwd", 768, 2).name: fewer}):
        (found,) = (x for x in launches_of(lambda: _mlp(768)) if x.entry is fewer)
    assert found.arguments["parts"].shape[0] == 7


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_what_a_search_tries_fits_the_shared_memory_of_the_chip(arch: int) -> None:
    limit = {0: 99, 80: 163, 90: 227, 100: 227}[arch] << 10
    space = selection(gemm.linear_launch, arch, 2, 768, 768, "linear", True).space
    assert len(space) > 5
    for entry in space:
        assert entry is not None
        m, n, k = (entry.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        assert entry.num_stages * (m + n) * k * 2 <= limit
