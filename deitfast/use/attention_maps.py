"""Where a model looks: the attention of the class and distillation tokens, per head and rolled out, over the photo.

Rollout is Abnar and Zuidema 2020 (arXiv 2005.00928): heads averaged, half of it the identity for the residual
connection, rows normalised, multiplied through the blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_COLOURS = np.array([(8, 6, 40), (88, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)
"""Dark to bright, evenly spaced: weak to strong attention."""
_COLUMNS = 7


@torch.no_grad()
def attention_maps(model: DeiT, images: Tensor) -> Tensor:
    """Attention weights of every block for normalised images (B, 3, S, S): fp32 (depth, B, heads, N, N), rows sum to 1.

    Computed beside the blocks, which run as they are: fused ones never hold these weights.
    """
    x_BND, maps = model.embed(images), []
    block: Any
    for block in model.blocks:
        heads = block.attn.num_heads
        q, k, _ = block.attn.qkv(block.norm1(x_BND)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).float()
        maps.append((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1))
        x_BND = block(x_BND)
    return torch.stack(maps)


def rollout(maps: Tensor) -> Tensor:
    """How much each token of the last block draws from each patch and prefix token at the input: (B, N, N).

    maps: (depth, B, heads, N, N).
    """
    mean = maps.mean(2)
    mixed = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
    result = mixed[0]
    for step in mixed[1:]:
        result = step @ result
    return result


def draw_attention(image: np.ndarray, maps: Tensor, prefix_tokens: int, block: int = -1, tile: int = 224) -> PILImage:
    """One picture: the photo, then for each prefix token every head of a block and the rollout over the photo.

    image: uint8 (S, S, 3), what the model saw. maps: (depth, 1, heads, N, N). block: counted from 0, negative from the
    end. tile: side of one map in pixels. Each map is scaled to its own range. Raises DeitfastError for a block that
    there is not.
    """
    from PIL import Image, ImageDraw, ImageFont

    depth, _, heads, tokens, _ = maps.shape
    if not -depth <= block < depth:
        raise DeitfastError(f"block {block} is not there: the model has blocks 0 to {depth - 1}")
    side = math.isqrt(tokens - prefix_tokens)
    photo = Image.fromarray(image).resize((tile, tile), Image.Resampling.BICUBIC)
    tiles = [("what the model saw", photo)]
    flow = rollout(maps)
    for token, name in list(enumerate(("class token", "distillation token")))[:prefix_tokens]:
        for head in range(heads):
            weights = maps[block, 0, head, token, prefix_tokens:]
            tiles.append((f"{name}, block {block % depth}, head {head}", _overlay(photo, weights, side)))
        tiles.append((f"{name}, rollout of all blocks", _overlay(photo, flow[0, token, prefix_tokens:], side)))
    columns = min(len(tiles), _COLUMNS)
    rows = -(-len(tiles) // columns)
    caption, gap = max(tile // 16, 10) + 8, 6
    font = ImageFont.load_default(caption - 8)
    picture = Image.new("RGB", (columns * (tile + gap) - gap, rows * (tile + caption)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, image_tile) in enumerate(tiles):
        left, top = i % columns * (tile + gap), i // columns * (tile + caption)
        draw.text((left + 2, top + 3), name, fill="black", font=font)
        picture.paste(image_tile, (left, top + caption))
    return picture


def _overlay(photo: PILImage, weights: Tensor, side: int) -> PILImage:
    """`weights` of side x side patches as colours over a faint grey photo."""
    from PIL import Image

    values = weights.float().cpu().numpy().reshape(side, side)
    low, high = values.min(), values.max()
    values = (values - low) / max(high - low, 1e-12)
    heat = Image.fromarray(values.astype(np.float32)).resize(photo.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(heat), 0, 1)
    grey = np.asarray(photo.convert("L"), float)[..., None]
    share = 0.25 + 0.5 * strength[..., None]
    return Image.fromarray((share * colours(strength) + (1 - share) * grey).astype(np.uint8))


def colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape to RGB (..., 3) in [0, 255], dark to bright."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, at, channel) for channel in _COLOURS.T], axis=-1)
