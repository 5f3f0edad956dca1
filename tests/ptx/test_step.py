"""A whole DeiT step as compiled code: what it launches, that a second one compiles nothing, and its losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from triton import knobs

from deitfast.data import Batch
from deitfast.distributed import World
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import Engine, make_engine
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe
from tests.ptx.kernels import compiled_kernels, needs_engine

pytestmark = needs_engine

DEPTH, BATCH, CLASSES, STEPS, LR = 2, 2, 10, 2, 1e-4
RECIPE = replace(
    Recipe(), model="deit_tiny_patch16_224", batch=BATCH, mix_group=BATCH, drop_path=0.1, clip_norm=1.0, engine="flat",
)  # fmt: skip

IN_A_BLOCK = {
    "layernorm_fwd_kernel": 2,
    "linear_kernel": 4 + 1,  # qkv, projection, fc1 and fc2 forward; backward only fc2's, times GELU's derivative
    "attention_fwd_short_kernel": 1,
    "scale_and_sum_kernel": 2,  # the bias gradient of each branch's last layer, times drop-path's factor
    "layernorm_bwd_kernel": 2,
    # Partial sums added up: for weight and bias together of two LayerNorms, the biases of the projection, fc1 and fc2,
    # and those of queries and values (that of keys has no gradient: it shifts all scores of a softmax alike).
    "row_sums_kernel": 2 + 3 + 2,
}
IN_THE_LAST_BLOCK = {  # where keys and values are of all tokens, all else of the class token alone
    "layernorm_fwd_kernel": 3,  # before keys and values, before the queries, before the MLP
    "linear_kernel": 5 + 1,  # keys and values, queries, projection, fc1 and fc2 forward; fc2's backward
    "scale_and_sum_kernel": 4,  # as above, and the bias gradients of keys and values, and of queries
    "layernorm_bwd_kernel": 3,
    "row_sums_kernel": 3 + 5,  # three LayerNorms; five biases
}
IN_A_STEP = {
    "input_patches_kernel": 1,
    "patch_embed_fwd_kernel": 1,
    "patch_embed_bwd_kernel": 1,
    "mixed_cross_entropy_fwd_kernel": 1,
    "mixed_cross_entropy_bwd_kernel": 1,
    "block_squares_kernel": 1,
    "sum_squares_kernel": 1,
    "adamw_kernel": 1,
}
ATTENTION_BACKWARD = {80: ("attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"), 90: ("attention_bwd_short_kernel",)}
"""Launches. What is a plain product (the other gradients of linear layers, the head) is cuBLAS's on a GPU."""


def launches_of_a_step(arch: int) -> Counter[str]:
    a_block = Counter(IN_A_BLOCK) + Counter(ATTENTION_BACKWARD[arch])
    blocks = Counter({kernel: (DEPTH - 1) * count for kernel, count in a_block.items()})
    return blocks + Counter(IN_THE_LAST_BLOCK) + Counter(IN_A_STEP)


def a_batch(step: int) -> Batch:
    """A pair of random images, mixed by a rectangle, one with an erased part."""
    generator = torch.Generator().manual_seed(step)
    index = torch.arange(BATCH)
    return Batch(
        step=step, slots=index.numpy(), epoch=torch.tensor([0]), index=index, view=index % 3,
        images=torch.randint(256, (BATCH, 224, 224, 3), generator=generator, dtype=torch.uint8),
        labels=torch.randint(CLASSES, (BATCH,), generator=generator),
        lam=torch.full((BATCH,), 1 - 60 * 70 / 224**2),
        mix_box=torch.tensor([20, 30, 60, 70]).repeat(BATCH, 1),
        erase=torch.tensor([10, 40, 30, 40]) * (index == 1)[:, None],
    )  # fmt: skip


def make(bf16: bool = True) -> Engine:
    torch.manual_seed(0)
    model = create_model(RECIPE.model, num_classes=CLASSES, drop_path=RECIPE.drop_path, depth=DEPTH, fused=True).train()
    world = World(0, 1, 0, torch.device("cpu"))
    return make_engine(model, RECIPE, world, DropPath(model, RECIPE, BATCH), accumulation=1, bf16=bf16)


def losses(engine: Engine) -> Iterator[float]:
    for step in range(STEPS):
        engine(iter([a_batch(step)]), step, LR)
        yield float(engine.pop_loss()[0])


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that Triton compiled, or fetched from its cache, for a launch that it had not seen."""
    names: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: names.append(fn.name))
    return names


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
def test_a_step_launches_what_it_should_and_only_the_first_compiles(arch, compilations):
    with compiled_kernels(arch, races=True) as gpu:
        found = []
        for step, loss in enumerate(losses(make())):
            found.append(loss)
            assert Counter(launch.kernel for launch in gpu.launches) == launches_of_a_step(arch)
            assert bool(compilations) == (step == 0), f"compiled in step {step}: {compilations}"
            gpu.launches.clear()
            compilations.clear()
    assert found == pytest.approx(list(losses(make(bf16=False))), rel=2.0**-8)
