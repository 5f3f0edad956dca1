"""LoRA on a Hugging Face ViT: adapters in the last blocks, the frozen blocks before them fused.

    pip install transformers peft
    python examples/lora.py

A block that holds adapters runs its library's own code, which accelerate() says; the others run fused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import deitfast


def main(config: ViTConfig | None = None, adapted: int = 4, steps: int = 10, batch: int = 8) -> list[float]:
    """Train adapters of a fresh model on random images and labels; the loss of every step. adapted: last blocks."""
    torch.manual_seed(0)
    config = config or ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # the kernels have no dropout
    blocks = config.num_hidden_layers
    model = ViTForImageClassification(config)  # .from_pretrained("google/vit-base-patch16-224") for real work
    lora = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"],
        layers_to_transform=list(range(blocks - adapted, blocks)),
    )  # fmt: skip
    model = get_peft_model(model, lora)
    report = deitfast.accelerate(model)
    assert len(report.replaced) == blocks - adapted, report.left

    images = torch.randn(batch, 3, config.image_size, config.image_size)
    labels = torch.arange(batch) % config.num_labels
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("loss of every step:", *(f"{loss:.3f}" for loss in main()))
