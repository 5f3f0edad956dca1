"""A model's parameters, gradients, moments and average as flat buffers, updated together by one optimiser call.

    flat = FlatState(model, recipe, torch.bfloat16)
    compute = flat.compute_model()                  # runs forward and backward
    loss(compute(x)).backward(); flat.gather(first=True)
    flat.update(torch.from_numpy(flat.scalars(lr, step)).to(device))

Every buffer has the same layout: the parameters in the model's order, each from a multiple of `BLOCK` elements on,
zeros between them; parameters that do not require a gradient come last, and gradients and moments end before them.
Memory in bytes a parameter: 4 master, 8 moments (SGD 4), 4 EMA, and the compute dtype's size for gradients; in bf16 2
more for the compute copy, and 4 more for the sum of gradients where they are accumulated or summed in fp32.

Of W processes each updates 1/W of the elements, its shard (shards.py), and keeps moments and average of those alone:
12 bytes a parameter become 12/W, beside a shard's own gradients (4/W, or 2/W), master (4/W) and compute copy (2/W).
Gradients travel between them in the dtype of `World.wire`: bf16 takes 2 more where they are summed here in fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor, nn

from deitfast.distributed import World
from deitfast.engine.optim import parameter_groups
from deitfast.engine.shards import Shards
from deitfast.errors import DeitfastError
from deitfast.kernels.flat_buffers import BLOCK, FlatBuffers, Optimizer, Scalars, Segments
from deitfast.kernels.optimizer import update
from deitfast.recipe import Recipe

_WHOLE = slice(None)
_SWAP = 1 << 24  # elements exchanged at a time, so that a swap needs little memory of its own


class FlatState:
    """Moves every parameter of `model` into one flat fp32 buffer, in place, and keeps all that an update needs.

    The parameters stay the objects they are (`p.data` becomes a view), so state dicts, tied weights and optimisers
    made before still work. Afterwards the model must not be moved to another device or dtype, and `requires_grad` must
    stay as it is; after loading weights into it call `refresh`. Parameters that do not require a gradient are neither
    updated nor decayed; every other one is, also where no gradient reaches it (its gradient is then zero).

    compute_dtype: of the compute copy and of the gradients. accumulates: keep a sum of gradients in fp32, for
    accumulation and for sums over processes; without effect in fp32, where `grad` itself sums. world: the processes
    that share the update, None for one alone.

    master, compute (N,), grad, grad_sum (n,), n <= N: the buffers, of all. compute is master in fp32, grad_sum None
    without `accumulates`. exp_avg, exp_avg_sq, ema, reduced (m,): of this process's shard; m = n for one alone. ema is
    None without `recipe.ema_decay`, exp_avg_sq None for SGD, whose momentum is exp_avg. `gather` fills outgoing,
    which is grad_sum, or else grad; sent is what of it travels, in the wire's dtype, the same buffer where that is its
    own; reduced is the sum of sent over the processes, which `update` reads: outgoing for one process alone. norm ()
    fp32: gradient norm of the last update, not clipped. skipped () int64: updates left out because that norm was
    infinite or NaN.
    Raises DeitfastError for parameters that are not fp32, lie on several devices, or of which none is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        compute_dtype: torch.dtype = torch.float32,
        accumulates: bool = False,
        world: World | None = None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer: Optimizer = recipe.optimizer  # type: ignore[assignment]
        named = dict(model.named_parameters())
        _check(named)
        named = dict(sorted(named.items(), key=lambda item: not item[1].requires_grad))  # stable: the frozen last
        self._parameters = named
        device = next(iter(named.values())).device
        trainable = [p for p in named.values() if p.requires_grad]
        self.shards = shards = Shards.of(sum(map(_padded, trainable)), world or World(0, 1, 0, device), BLOCK)
        self._offsets: dict[str, int] = {}
        size, trained = 0, shards.size
        for name, parameter in named.items():
            if len(self._offsets) == len(trainable):
                size = trained  # the frozen ones
            self._offsets[name] = size
            size += _padded(parameter)
        size = max(size, trained)

        self.master = torch.zeros(size, device=device)
        for name, view in self._views(self.master):
            parameter = named[name]
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = None
        self.compute = self.master
        if compute_dtype != torch.float32:
            self.compute = torch.zeros(size, dtype=compute_dtype, device=device)
        self.grad = torch.zeros(trained, dtype=compute_dtype, device=device)
        sums = accumulates and compute_dtype != torch.float32
        self.grad_sum = torch.zeros(trained, device=device) if sums else None
        self.outgoing = self.grad if self.grad_sum is None else self.grad_sum
        self.sent = self.reduced = self.outgoing
        if not shards.is_whole:
            if shards.world.wire == torch.bfloat16 != self.outgoing.dtype:
                self.sent = torch.zeros(trained, dtype=torch.bfloat16, device=device)
            self.reduced = torch.zeros(shards.own_size, dtype=self.sent.dtype, device=device)
        self.exp_avg = torch.zeros(shards.own_size, device=device)
        self.exp_avg_sq = None if recipe.optimizer == "sgd" else torch.zeros(shards.own_size, device=device)
        self._own_master = shards.own(self.master[:trained])
        self._own_compute = self._own_master
        if self.compute is not self.master:
            self._own_compute = shards.own(self.compute[:trained])
        self.ema = self._own_master.clone() if recipe.ema_decay else None
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.computed: list[tuple[nn.Parameter, int]] = []  # trained ones of `compute_model`, each one's first element

        decays = _decays(model, recipe)
        sizes = [p.numel() for p in trainable]
        self._buffers = FlatBuffers(
            segments=Segments.of(sizes, [decays[id(p)] for p in trainable], device, shards.own_blocks()),
            grad=self.reduced,
            master=self._own_master,
            exp_avg=self.exp_avg,
            exp_avg_sq=self.exp_avg_sq,
            ema=self.ema,
            compute=None if self.compute is self.master else self._own_compute,
            norm=self.norm,
            skipped=self.skipped,
            steps=torch.zeros((), device=device),
            gather=None if shards.is_whole else self._gather_squares,
        )
        self.refresh()

    def compute_model(self) -> nn.Module:
        """The model that runs forward and backward: `model` itself in fp32, else a copy in the compute dtype.

        The copy's parameters are views into `compute` and, like the model, tied where the model ties them; its buffers
        are the model's own.
        """
        named, model = self._parameters, self.model
        if self.compute is not self.master:
            copies: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
            computed = dict(self._views(self.compute))
            for name, parameter in named.items():
                copies[id(parameter)] = nn.Parameter(computed[name], requires_grad=parameter.requires_grad)
            model = copy.deepcopy(model, copies)
            named = {name: copies[id(parameter)] for name, parameter in named.items()}  # type: ignore[misc]
        self.computed = [(named[name], int(view.storage_offset())) for name, view in self._views(self.grad)]
        self.zero_grad()
        return model

    def zero_grad(self) -> None:
        """Forget what backwards left in the computed parameters."""
        for parameter, _ in self.computed:
            parameter.grad = None

    @torch.no_grad()
    def gather(self, first: bool, part: slice = _WHOLE) -> None:
        """Move the gradients that a backward left in the computed parameters to their sum, or to a part of it.

        They begin a new sum there where `first`, else they are added; a parameter without one counts as zero. Autograd
        keeps the tensors that the backward made, where it would add each to a zeroed view by a kernel of its own: a
        few kernels move them all. part: a run of whole parameters.
        """
        total = self.outgoing
        staged = self.grad_sum is not None and not first
        target = self.grad if staged else total
        views, gradients = [], []
        for parameter, start in self.computed:
            if start not in range(*part.indices(target.numel())):
                continue
            view = target[start : start + parameter.numel()].view(parameter.shape)
            if parameter.grad is not None:
                views.append(view)
                gradients.append(parameter.grad)
                parameter.grad = None
            elif first or staged:
                view.zero_()
        if views:
            (torch._foreach_copy_ if first or staged else torch._foreach_add_)(views, gradients)
        if staged:
            total[part].add_(self.grad[part])

    def scalars(self, lr: float, step: int) -> np.ndarray:
        """What update number `step` (from 0) at learning rate `lr` needs: (12,) fp32, see `flat_buffers.Scalars`.

        Computed in double precision, so that the kernels only multiply and divide.
        """
        recipe, number = self.recipe, step + 1
        correction1, correction2 = 1 - recipe.beta1**number, 1 - recipe.beta2**number
        scalars = Scalars(
            lr=lr,
            step=number,
            step_size=lr / correction1,
            bias_correction1=correction1,
            bias_correction2_sqrt=math.sqrt(correction2),
            beta1=recipe.beta1,
            one_minus_beta1=1 - recipe.beta1,
            beta2=recipe.beta2,
            one_minus_beta2=1 - recipe.beta2,
            eps=recipe.adam_eps,
            clip_norm=recipe.clip_norm,
            ema_weight=1 - recipe.ema_decay,
        )
        return np.array(astuple(scalars), dtype=np.float32)

    @torch.no_grad()
    def update(self, scalars: Tensor) -> None:
        """One optimiser step from `reduced`: clip, AdamW, LAMB or SGD, EMA, compute copy. Never waits for the device.

        scalars: of `scalars`, on the parameters' device. Where the gradient's norm is not finite, `norm` and `skipped`
        say so and nothing else changes. Of several processes each updates its shard; then all have the compute copy.
        """
        update(self.optimizer, self._buffers, scalars)
        self.shards.gather(self._own_compute, self.compute[: self.shards.size])

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the compute copy from the master weights, after something else than `update` wrote them."""
        trained = slice(self.shards.size)
        if self.compute is not self.master:
            self.compute.copy_(self.master)
        if not self.shards.is_whole:
            self._own_master.copy_(self.shards.own(self.master[trained]))
            self._own_compute.copy_(self.shards.own(self.compute[trained]))

    @torch.no_grad()
    def complete(self) -> None:
        """Make the master weights whole, of which `update` writes this process's shard; on every process, together."""
        if self.compute is not self.master:  # in fp32 they are the compute copy, which `update` made whole
            self.shards.gather(self._own_master, self.master[: self.shards.size])

    @torch.no_grad()
    def broadcast(self) -> None:
        """Give every process the leading one's weights; moments and average, where a step was taken, stay."""
        world = self.shards.world
        world.broadcast(self.master)
        world.broadcast(self._buffers.steps)
        self.refresh()
        if self.ema is not None and not self._buffers.steps:
            self.ema.copy_(self._own_master)

    def _gather_squares(self, own: Tensor) -> Tensor:
        return self.shards.gather_blocks(own)[:, : self._buffers.segments.blocks].contiguous()

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name, with the names and shapes of `optim.optimizer_tensors`.

        AdamW and LAMB: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`; SGD: `momentum_buffer.NAME`. Views but for the
        step; of several processes, which call it together, the leading one gets copies on the host and the others {}.
        """
        tensors: dict[str, Tensor] = {}
        for key, shard in self._moments().items():
            tensors |= {f"{key}.{name}": view for name, view in self._whole_views(shard)}
        if self.exp_avg_sq is not None and tensors:
            tensors |= {f"step.{name}": self._buffers.steps.clone() for name in self._trained()}
        return tensors

    @torch.no_grad()
    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `optimizer_tensors`; an empty mapping, an optimiser's before its first step, clears the state.

        Raises DeitfastError where one is missing or has another shape.
        """
        for key, shard in self._moments().items():
            if tensors:
                self._read(shard, tensors, f"{key}.", "the optimiser's state")
            else:
                shard.zero_()
        steps = [tensor for name, tensor in tensors.items() if name.startswith("step.")]
        self._buffers.steps.copy_(steps[0]) if steps else self._buffers.steps.zero_()

    def ema_tensors(self) -> dict[str, Tensor]:
        """The averaged parameters by name; empty without EMA. Views, or as `optimizer_tensors` says."""
        if self.ema is None:
            return {}
        averages = dict(self._whole_views(self.ema))
        frozen = {name: view for name, view in self._views(self.master) if name not in self._trained()}
        return averages | frozen if averages else {}

    @torch.no_grad()
    def load_ema(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `ema_tensors`. Raises DeitfastError where one is missing or has another shape."""
        if self.ema is not None:
            self._read(self.ema, tensors, "", "the averaged weights")

    @torch.no_grad()
    def averages(self) -> Tensor:
        """The averaged weights (n,), whole on every process, which call it together; the buffer itself for one alone.

        Raises DeitfastError without EMA.
        """
        if self.ema is None:
            raise DeitfastError("there are no averaged weights: --ema-decay is 0. Give it a value such as 0.9999")
        if self.shards.is_whole:
            return self.ema
        whole = torch.empty(self.shards.size, device=self.ema.device)
        self.shards.gather(self.ema, whole)
        return whole

    @torch.no_grad()
    def swap(self, averages: Tensor) -> None:
        """Exchange the master weights with their `averages`, in place; a second call restores both, bit by bit."""
        for weights, average in zip(self.master[: self.shards.size].split(_SWAP), averages.split(_SWAP), strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def _moments(self) -> dict[str, Tensor]:
        """This process's moments, by the name that a checkpoint gives them."""
        if self.exp_avg_sq is None:
            return {"momentum_buffer": self.exp_avg}
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def _trained(self) -> set[str]:
        return {name for name, parameter in self._parameters.items() if parameter.requires_grad}

    def _whole_views(self, shard: Tensor) -> Iterable[tuple[str, Tensor]]:
        """`_views` of the buffer that the shards of all processes make; of one on the leading process's host."""
        whole = shard if self.shards.is_whole else self.shards.gather_on_leader(shard)
        return () if whole is None else self._views(whole)

    def _read(self, shard: Tensor, tensors: Mapping[str, Tensor], prefix: str, what: str) -> None:
        """Fill `shard` from whole tensors by name."""
        whole = shard if self.shards.is_whole else torch.zeros(self.shards.size)
        for name, view in self._views(whole):
            view.copy_(_find(tensors, prefix + name, view.shape, what))
        if not self.shards.is_whole:
            shard.copy_(self.shards.own(whole))

    def _views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view in the parameter's shape) in order; the trained ones only, of a buffer that ends with them."""
        for name, parameter in self._parameters.items():
            start = self._offsets[name]
            if parameter.requires_grad or flat.numel() > self.shards.size:
                yield name, flat[start : start + parameter.numel()].view(parameter.shape)


def _padded(parameter: nn.Parameter) -> int:
    """Elements that a parameter takes in a flat buffer."""
    return -(-parameter.numel() // BLOCK) * BLOCK


def _check(named: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise DeitfastError(f"parameter {name} is {parameter.dtype}, must be float32: call model.float() first")
    devices = sorted({str(parameter.device) for parameter in named.values()})
    if len(devices) > 1:
        raise DeitfastError(f"the model's parameters lie on {', '.join(devices)}: move it to one device first")
    if not any(parameter.requires_grad for parameter in named.values()):
        raise DeitfastError(
            f"none of the model's {len(named)} parameters requires a gradient: there is nothing to train"
        )


def _decays(model: nn.Module, recipe: Recipe) -> dict[int, float]:
    """Weight decay by the id of a parameter."""
    groups = parameter_groups(model, recipe.weight_decay, decay_dist_token=recipe.deit_compat)
    return {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}


def _find(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, what: str) -> Tensor:
    if name not in tensors:
        raise DeitfastError(f"{what} has no {name}: it is another model's or optimiser's")
    if tensors[name].shape != shape:
        found = tuple(tensors[name].shape)
        raise DeitfastError(f"{name} in {what} has shape {found}, the model's is {tuple(shape)}")
    return tensors[name]
