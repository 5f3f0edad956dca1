"""A convnet teacher for small images, trained here by a stated recipe and exported for `--teacher FILE.pt2`.

    python -m benchmarks.paper.teacher --data DATA --out teacher.pt2 [--image-size 32] [--epochs 60] [--seed 0]

The network is a residual net in the manner of He et al. 2016 (arXiv 1512.03385, section 4.2, the nets for CIFAR): a
3 x 3 stem and three stages of one basic block each, the later two twice and four times as wide and of half the side.
The recipe is that section's with a shorter schedule: SGD with momentum .9 (Nesterov's), learning rate .1 in one cycle,
weight decay 5e-4, batch 64, crops after padding by an eighth of the side, flips; label smoothing .1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deitfast.data import EvalLoader, Manifest, normalise, open_dataset

LR, BATCH = 0.1, 64


class Block(nn.Module):
    """Two 3 x 3 convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.around(x) + self.branch(x))


def convnet(classes: int, width: int) -> nn.Module:
    """Images (B, 3, S, S), normalised as the student's, to logits (B, classes)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def pixels(split: Manifest, image_size: int) -> tuple[Tensor, Tensor]:
    """All images of a split, uint8 (n, 3, S, S), and their labels."""
    batches = list(EvalLoader(split, image_size, crop_ratio=1.0, batch=500, workers=1))
    images = torch.cat([images for images, _ in batches]).permute(0, 3, 1, 2).contiguous()
    return images, torch.cat([labels for _, labels in batches])


def augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """Padded, cropped and flipped, each image by its own draw; normalised fp32 (m, 3, S, S)."""
    m, _, side, _ = images.shape
    pad = side // 8
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, m, 1), generator=draws)
    grid = torch.arange(side)
    columns = torch.where(torch.rand(m, 1, generator=draws) < 0.5, grid.flip(0), grid) + left
    rows = (grid + top)[:, None, :, None]
    cropped = padded[torch.arange(m)[:, None, None, None], torch.arange(3)[None, :, None, None], rows,
                     columns[:, None, None, :]]  # fmt: skip
    return normalise(cropped.permute(0, 2, 3, 1))


def train(
    data: tuple[Tensor, Tensor], classes: int, epochs: int, seed: int, *, width: int,
    until: tuple[float, tuple[Tensor, Tensor]],
) -> tuple[nn.Module, float]:  # fmt: skip
    """The network after `epochs` passes over (images, labels), and its top-1.

    until: percent of right answers, and the images on which they count; training ends after the epoch that reaches it,
    for a teacher as good as another one and no better.
    """
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    network = convnet(classes, width)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, labels = data
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    enough, held_out = until
    score = 0.0
    for epoch in range(epochs):
        network.train()
        for chosen in torch.randperm(len(images), generator=draws)[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(network(augmented(images[chosen], draws)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if enough < 100 or epoch == epochs - 1:
            score = top1(network.eval(), held_out)
        if score >= enough:
            break
    return network.eval(), score


@torch.no_grad()
def top1(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Percent."""
    right = [
        (network(normalise(images.permute(0, 2, 3, 1))).argmax(1) == labels).sum()
        for images, labels in zip(data[0].split(500), data[1].split(500), strict=True)
    ]
    return 100 * int(torch.stack(right).sum()) / len(data[1])


def export(network: nn.Module, path: Path, image_size: int) -> None:
    """The file that `--teacher` takes, and the JSON beside it that states the input."""
    example = torch.zeros(2, 3, image_size, image_size)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("images")},))
    torch.export.save(program, path)
    Path(f"{path}.json").write_text(json.dumps({"size": image_size}) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--width", type=int, default=32, help="channels of the stem and the first stage [32]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    data = open_dataset(options.data)
    assert data.train is not None
    assert data.val is not None
    began = time.process_time()
    network, score = train(
        pixels(data.train, options.image_size), len(data.classes), options.epochs, options.seed, width=options.width,
        until=(100.0, pixels(data.val, options.image_size)),
    )  # fmt: skip
    export(network, options.out, options.image_size)
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    print(
        f"{options.out}: {parameters:.2f} M parameters, top-1 {score:.2f} %, {time.process_time() - began:.0f} s of CPU"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
