"""Drop-path of one micro-batch: drawn on the host, a pure function of (seed, step, slot).

bernoulli: every image drops every branch with the block's probability p (Huang et al. 2016; the paper's form).
subset: in every mix group of G images exactly round(G (1 - p)) keep the branch, drawn at random, and only they compute
it (the idea of dinov2's drop_add_residual_stochastic_depth). An image's chance is the same up to that rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deitfast.data import Batch, philox
from deitfast.data.batch import to_device
from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT, Subset, path_scales
from deitfast.recipe import Recipe


class DropPath:
    """Draws for the blocks of a model. `draw` gives tensors, `arrange` what `DeiT.forward` takes of them."""

    def __init__(self, model: DeiT, recipe: Recipe, micro_batch: int) -> None:
        self.rates, self.seed, self.group = model.drop_path_rates, recipe.seed, recipe.mix_group
        self.active = any(self.rates)
        self.subset = recipe.drop_path_form == "subset"
        if self.active and self.subset and micro_batch % self.group:
            raise DeitfastError(
                f"--drop-path-form subset draws in mix groups of {self.group}, but a process runs {micro_batch} images "
                "at once. Change --micro-batch or --mix-group so that the one is a multiple of the other"
            )

    def draw(self, batch: Batch) -> list[Tensor]:
        """On the batch's device: [scales (depth, 2, m) fp32] or, for subset, int64 (2, K) a block that drops."""
        if not self.active:
            return []
        branches, images = 2 * len(self.rates), len(batch.slots)
        words = philox.uniforms(philox.DROP_PATH, batch.slots, batch.step, 0, self.seed, blocks=-(-branches // 4))
        uniform = words.reshape(-1, images)[:branches].reshape(-1, 2, images)
        device = batch.images.device
        if not self.subset:
            return [to_device(path_scales(torch.from_numpy(uniform).float(), self.rates).numpy(), device)]
        return [to_device(self._kept(uniform[i], k), device) for i, k in self._counts() if k < self.group]

    def arrange(self, drawn: list[Tensor]) -> Tensor | list[Subset | None] | None:
        """What `DeiT.forward` takes, made of what `draw` gave: no copy."""
        if not drawn:
            return None
        if not self.subset:
            return drawn[0]
        rest = iter(drawn)
        return [Subset(next(rest), self.group / k) if k < self.group else None for _, k in self._counts()]

    def _counts(self) -> list[tuple[int, int]]:
        """(block, images of a group that keep its branches); at least one."""
        return [(i, max(1, round(self.group * (1 - p)))) for i, p in enumerate(self.rates)]

    def _kept(self, uniform_2B: np.ndarray, count: int) -> np.ndarray:
        """The `count` smallest draws of every group, as ascending positions in the micro-batch: int64 (2, K)."""
        groups = uniform_2B.reshape(2, -1, self.group)
        chosen = np.sort(np.argsort(groups, axis=-1, kind="stable")[..., :count], axis=-1)
        first = np.arange(groups.shape[1])[None, :, None] * self.group
        return (chosen + first).reshape(2, -1)
