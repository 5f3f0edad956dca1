"""A timm ViT, trained for a few steps with deitfast's fused blocks: the loop is your own, one line is new.

pip install timm
python examples/accelerate_timm.py
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F

import deitfast


def main(name: str = "vit_small_patch16_224", steps: int = 10, batch: int = 8, **options: object) -> list[float]:
    """Train `name` on random images and labels; the loss of every step. options: timm's."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(name, num_classes=10, **options).to(device)
    report = deitfast.accelerate(model)  # before DistributedDataParallel and torch.compile; state dict and names stay
    assert report.replaced, report.left

    size = model.patch_embed.img_size[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.arange(batch, device=device) % 10
    losses = []
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of every step:", *(f"{loss:.3f}" for loss in main()))
