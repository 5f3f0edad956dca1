"""Attention maps: the weights that the model uses, their rollout, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deitfast.cli.main import main
from deitfast.errors import DeitfastError
from deitfast.model.factory import create_model
from deitfast.model.fused import fuse
from deitfast.use.attention_maps import attention_maps, colours, draw_attention, rollout
from tests.test_weights import images, small


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"layer_scale": 0.3, "class_position": False}])
@pytest.mark.parametrize("fused", [False, True])
def test_the_weights_are_those_the_blocks_use(options: dict, fused: bool) -> None:
    """Attention output made of the maps equals the model's own, in every block."""
    model = small(**options)
    recorded: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: recorded.append((inputs[0], output)))
    with torch.no_grad():
        model(images())
    calls = list(recorded)
    if fused:
        fuse(model)
    maps = attention_maps(model, images())
    tokens = 9 + model.num_prefix_tokens
    assert maps.shape == (2, 2, 2, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    for block, (x, out), weights in zip(model.blocks, calls, maps, strict=True):
        _, _, v = block.attn.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(mixed), out, rtol=1e-4, atol=1e-5)


def test_rollout_against_numpy() -> None:
    maps = torch.rand(3, 2, 4, 5, 5, dtype=torch.float64).softmax(-1)
    for b in range(2):
        expected = np.eye(5)
        for layer in maps[:, b].numpy():
            mean = layer.mean(0)
            step = (mean + np.eye(5)) / (mean + np.eye(5)).sum(1, keepdims=True)
            expected = step @ expected
        np.testing.assert_allclose(rollout(maps)[b].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_the_picture_is_bright_where_the_attention_is() -> None:
    """A map made by hand: the class token looks at the upper right patch, the distillation token at the lower left."""
    maps = torch.full((1, 1, 1, 11, 11), 1e-3)
    maps[0, 0, 0, 0, 2 + 2] = 1
    maps[0, 0, 0, 1, 2 + 6] = 1
    photo = np.full((24, 24, 3), 128, np.uint8)
    picture = np.asarray(draw_attention(photo, maps, prefix_tokens=2, tile=96)).astype(int)
    caption = picture.shape[0] - 96
    tiles = [picture[caption:, i * 102 : i * 102 + 96] for i in range(5)]  # photo, head, rollout, head, rollout
    assert picture.shape[1] == 5 * 102 - 6
    assert (np.abs(tiles[0] - 128) <= 1).all()
    for tile, (row, column) in ((tiles[1], (0, 2)), (tiles[2], (0, 2)), (tiles[3], (2, 0)), (tiles[4], (2, 0))):
        brightness = tile.sum(-1).reshape(3, 32, 3, 32).mean((1, 3))
        assert np.unravel_index(brightness.argmax(), (3, 3)) == (row, column)


def test_colours_run_from_dark_to_bright() -> None:
    ramp = colours(np.linspace(0, 1, 50)).sum(-1)
    assert (np.diff(ramp) > 0).all()
    assert colours(np.zeros((2, 3))).shape == (2, 3, 3)


def test_many_heads_are_wrapped_and_a_wrong_block_is_named() -> None:
    maps = torch.rand(2, 1, 12, 10, 10)
    picture = draw_attention(np.zeros((24, 24, 3), np.uint8), maps, prefix_tokens=1, tile=32)
    assert picture.width == 7 * 38 - 6
    assert picture.height == 2 * (32 + 18)
    with pytest.raises(DeitfastError, match="the model has blocks 0 to 1"):
        draw_attention(np.zeros((24, 24, 3), np.uint8), maps, 1, block=2)


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(create_model("deit_digits_patch4_16", num_classes=3).state_dict(), tmp_path / "x.safetensors")
    Image.new("RGB", (30, 20), "green").save(tmp_path / "photo.png")
    out = tmp_path / "out.jpg"
    command = ["attention", str(tmp_path / "photo.png"), "--weights", str(tmp_path / "x.safetensors"), "--tile", "64"]
    main([*command, "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert Image.open(out).width == 6 * 70 - 6  # the photo, four heads and the rollout
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "out.doc")])
    assert "Give --out NAME.jpg" in capsys.readouterr().err
