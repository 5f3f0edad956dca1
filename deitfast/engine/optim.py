"""What changes the weights: parameter groups, AdamW and SGD, the learning rate as a function of the step, and EMA.

`deit_compat` repeats what the authors' code (main.py of facebookresearch/deit with timm 0.3.2) does beside its paper:

- The learning rate is a staircase, one value an epoch, and a step late: `scheduler.step(epoch)` runs after the epoch,
  so that epochs 0 and 1 both train at `warmup_lr` and the last one stops short of the schedule's end.
- A peak below `min_lr` rises to `min_lr` over the cosine; ours never leaves the peak then.
- The distillation token is decayed, since only `cls_token` and `pos_embed` are on timm's list of exceptions.

Not repeated, because they are accidents of a machine: repeated augmentation that is dropped on one process, and
another learning rate after a resume.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe

_TOKENS = ("cls_token", "dist_token", "pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float, decay_dist_token: bool = False) -> list[dict]:
    """Two groups: matrices with decay; biases, norms, LayerScale, tokens and position embeddings without.

    timm's rule in the paper's code, except that the distillation token is spared too; decay_dist_token decays it, as
    the original does.
    """
    tokens = [name for name in _TOKENS if not (decay_dist_token and name == "dist_token")]
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (spared if parameter.ndim <= 1 or name in tokens else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The plain engine's optimiser over `parameter_groups`: AdamW, or SGD with Nesterov momentum; fused on CUDA.

    DeitfastError for LAMB, which only the other engines have.
    """
    groups = parameter_groups(model, recipe.weight_decay, decay_dist_token=recipe.deit_compat)
    fused = next(model.parameters()).is_cuda or None
    if recipe.optimizer == "adamw":
        betas = (recipe.beta1, recipe.beta2)
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.adam_eps, fused=fused)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.beta1, nesterov=recipe.beta1 > 0, fused=fused)
    raise DeitfastError("--engine plain has no LAMB: PyTorch ships none. Use --engine flat")


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then cosine over the whole run to `min_lr`.

    The cosine counts from step 0, so it is already past its peak when the warm-up inside it ends (timm's
    CosineLRScheduler with warmup_prefix off); it moves every step, where the original moves every epoch. With
    `deit_compat` it is the original's staircase, see the module's docstring.
    """
    floor = min(recipe.min_lr, recipe.lr)
    if recipe.deit_compat:
        step, steps_per_epoch, floor = max(step // steps_per_epoch - 1, 0), 1, recipe.min_lr
    total, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
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


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`; `momentum_buffer.NAME` of SGD.

    Empty before the first step.
    """
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    keys = {key.split(".", 1)[0] for key in tensors}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: {key: tensors[f"{key}.{name}"] for key in keys} for i, name in enumerate(ordered)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
