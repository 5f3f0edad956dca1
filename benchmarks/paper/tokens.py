"""How alike class and distillation token are through depth. DeiT paper, section 4: .06 as learned, .93 at the end."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.data import EvalLoader, normalise, open_dataset
from deitfast.files import write_atomically
from deitfast.model.deit import DeiT
from deitfast.model.factory import load_model

_IMAGES = 256


@torch.no_grad()
def cosines(model: DeiT, images: Tensor) -> list[float]:
    """Mean cosine similarity of a distilled model's two tokens over images (B, 3, S, S), normalised: of the two as
    learned, then after every block."""
    x_BND = model.embed(images)
    learned = F.cosine_similarity(model.cls_token[0, 0], model.dist_token[0, 0], dim=0)
    found = [float(learned)]
    for block in model.blocks:
        x_BND = block(x_BND, None, None)
        found.append(float(F.cosine_similarity(x_BND[:, 0], x_BND[:, 1], dim=-1).mean()))
    return found


def compare_tokens(run: str, seed: int, folder: Path, data: str, path: Path) -> None:
    """Write to `path` the cosines of the best weights in a run's `folder`, on images of all of the validation set."""
    if path.exists() or not (folder / "best").exists():
        return
    model = load_model(None, folder / "best").model
    val = open_dataset(data, "val", quiet=True).val
    assert val is not None
    images, _ = next(iter(EvalLoader(val.spread(_IMAGES), model.image_size, crop_ratio=1.0, batch=_IMAGES, workers=1)))
    content = {"run": run, "seed": seed, "images": len(images), "cosines": cosines(model, normalise(images))}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
