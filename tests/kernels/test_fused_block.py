"""The fused block against the eager one, in whole models: eager implementations plainly, kernels in the interpreter."""

from __future__ import annotations

import copy
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import deitfast.data
from deitfast.model.deit import Block, DeiT, Subset
from deitfast.model.fused import FusedBlock, fuse
from tests.kernels.tolerance import assert_close_to_float64
from tests.vit_peers import SMALL, assert_accelerates, images, perturb, small_timm


def run_block(block: Block, x: torch.Tensor, drop: torch.Tensor | Subset | None) -> dict[str, torch.Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    out = block(x, drop)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    (out * weights).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}


KEEP = torch.tensor([[0.0, 1.25], [1.25, 0.0]])


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "heads", "layer_scale", "drop"),
    [
        (1, 197, 64, 1, None, None),
        (2, 17, 192, 3, 0.3, KEEP),
        (3, 1, 64, 1, 0.3, None),
        (4, 10, 64, 2, 0.3, Subset(torch.tensor([[0, 1, 3], [1, 2, 3]]), 4 / 3)),
        (2, 198, 64, 1, None, Subset(torch.tensor([[1], [0]]), 2.0)),
    ],
)
def test_block_is_as_near_to_float64_as_eager(batch, tokens, width, heads, layer_scale, drop, device, dtype):
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("the ops' own tests cover 16 bit on CPU")
    torch.manual_seed(0)
    block = perturb(Block(width, heads, 4.0, layer_scale)).to(device, dtype)
    x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    drop = Subset(drop.index_2K.to(device), drop.scale) if isinstance(drop, Subset) else drop
    drop = drop.to(device) if isinstance(drop, torch.Tensor) else drop
    exact = run_block(copy.deepcopy(block).double(), x.double(), drop)
    eager = run_block(block, x, drop)
    block.__class__ = FusedBlock
    fused = run_block(block, x, drop)
    assert fused.keys() == eager.keys() == exact.keys()
    for name in eager:
        # One token attends to itself alone: queries and keys have no gradient, only rounding.
        assert_close_to_float64(name, fused[name], exact[name], eager[name], 2.0 if name == "out" else 3.0)


@pytest.mark.parametrize("library", SMALL)
def test_small_models_of_every_library(library, device):
    model = SMALL[library]().eval().to(device)
    assert_accelerates(model, images(model), blocks=2)


def test_layer_scale_drop_path_and_a_batch_of_one():
    model = small_timm(init_values=0.3, drop_path_rate=0.5).train()
    assert_accelerates(model, images(model, batch=5), blocks=2)
    model = small_timm(class_token=False, global_pool="avg", qkv_bias=False, depth=1).train()
    assert_accelerates(model, images(model, batch=1), blocks=1)


def real_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the packaged handwritten digits: (count, 3, 32, 32) in [-1, 1], and their classes."""
    tensors, labels = [], []
    with tarfile.open(Path(deitfast.data.__file__).parent / "digits" / "train.tar") as archive:
        names = sorted(name for name in archive.getnames() if name.endswith((".png", ".jpg")))
        for name in names[:: len(names) // count][:count]:
            file = archive.extractfile(name)
            assert file is not None
            pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB").resize((32, 32)), dtype=np.float32)
            tensors.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
            labels.append(int(name.split("/")[0]))
    return torch.stack(tensors), torch.tensor(labels)


def train_ten_steps(model: DeiT, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for step in range(10):
        batch = slice(2 * step, 2 * step + 2)
        path_scale = ((torch.rand(2, 2, 2, generator=generator) >= 0.1) / 0.9).to(x)
        loss = F.cross_entropy(model(x[batch], path_scale), target[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_ten_training_steps_on_real_images_follow_eager(device):
    x, target = (tensor.to(device) for tensor in real_images(20))
    torch.manual_seed(0)
    eager = DeiT(width=64, depth=2, num_heads=1, image_size=32, patch_size=8, num_classes=10, drop_path=0.1)
    eager.train().to(device)
    fused = fuse(copy.deepcopy(eager))
    expected, actual = train_ten_steps(eager, x, target), train_ten_steps(fused, x, target)
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)
