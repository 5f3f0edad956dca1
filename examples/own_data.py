"""Fine-tune on your own photos from Python, then ask the model what it sees. Called again, it resumes.

    python examples/own_data.py PHOTOS deit_tiny_patch16_224-a1311bcf.pth

PHOTOS holds train/<class>/* and val/<class>/*. The weight file may be the authors', timm's, Hugging Face's or a run's.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import deitfast
from deitfast.recipes.deit_tiny import RECIPE


def main(photos: str, weights: str, out: str = "runs/own_data", **settings: object) -> str:
    """The class that the fine-tuned model sees in the first validation photo. settings: more of the recipe's."""
    recipe = replace(
        RECIPE, data=photos, init=weights, reset_head=True, out=out,
        epochs=30, batch=64, lr=1e-4, warmup_epochs=1, ema_decay=0.99,
        repeats=1, crop_min=0.5, rand_augment="none", mixup=0.0, cutmix=0.0, erase=0.0, drop_path=0.0,
    )  # fmt: skip
    result = deitfast.train(replace(recipe, **settings))
    print(f"top-1 {result.raw.top1:.1f} % on {result.raw.images} validation photos")
    photo = next(path for path in sorted(Path(photos, "val").rglob("*")) if path.is_file())
    seen = deitfast.inference_model(Path(out), str(photo))
    assert isinstance(seen, dict)
    print(f"{photo}: {seen['pred_class']} ({seen['pred_score']:.2f})")
    return seen["pred_class"]


if __name__ == "__main__":
    main(*sys.argv[1:])
