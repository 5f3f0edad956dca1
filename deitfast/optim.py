"""What changes the weights: parameter groups, AdamW, the learning rate as a pure function of the step, and EMA."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deitfast.recipe import Recipe

_TOKENS = ("cls_token", "dist_token", "pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with decay; biases, norms, LayerScale, tokens and position embeddings without.

    timm's rule in the paper's code, except that the distillation token is spared too (the original decays it).
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (spared if parameter.ndim <= 1 or name in _TOKENS else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; one fused kernel on CUDA."""
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps, fused=on_cuda or None,
    )  # fmt: skip


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then cosine over the whole run to `min_lr`.

    The cosine counts from step 0, so it is already past its peak when the warm-up inside it ends (timm's
    CosineLRScheduler with warmup_prefix off); it moves every step, where the original moves every epoch.
    """
    total, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
    floor = min(recipe.min_lr, recipe.lr)
    return floor + (recipe.lr - floor) * (1 + math.cos(math.pi * step / total)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of a model's parameters, in fp32, beside them on their device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average <- decay x average + (1 - decay) x parameter."""
        parameters = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), parameters, 1 - self.decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's parameters with the average; a second call restores them."""
        for parameter, average in zip(model.parameters(), self.tensors.values(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, average in self.tensors.items():
            average.copy_(tensors[name])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`. Empty before the first step."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    keys: Iterable[str] = {key.split(".", 1)[0] for key in tensors}
    state: dict[int, dict[str, Tensor]] = {}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(ordered):
        state[i] = {key: tensors[f"{key}.{names[parameter]}"] for key in keys}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
