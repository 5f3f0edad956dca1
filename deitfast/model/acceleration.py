"""`accelerate(model)`: the fused kernels inside a Vision Transformer of timm, Hugging Face or torchvision, in place.

A block is accelerated by giving it a subclass of its own class whose `forward` runs the kernels. Modules, parameters,
hooks on the block, state dict and optimiser state stay what they are, and so do isinstance and the class's name:
checkpoints, DDP, FSDP wrapping by name, deepcopy and pickle go on working. What a block does that the kernels do not
(dropout, an attention mask, normalised queries, another activation) leaves that block, or that call, to its library.
No such library is imported here: a model that comes from one has imported it already.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from deitfast.compiler import check_compiler
from deitfast.errors import DeitfastError
from deitfast.model.class_token import is_classifier, reading_forward, tokens_read
from deitfast.model.fitness import Fusible, dotted, examine, find_problem
from deitfast.model.fused import (
    BlockTensors,
    FusedBlock,
    block_tensors,
    fused_block_forward,
    head_problems,
    layer_problems,
    problems_by_timms_names,
    wrong_class,
)
from deitfast.verification.verify import FUSED_OPS, Question, Shape, trust


class Packed(NamedTuple):
    """Queries, keys and values as one layer."""

    weight: Tensor
    bias: Tensor | None


def _verified_forward(x: Tensor, tensors: BlockTensors, num_heads: int, **options: Any) -> Tensor:
    """`fused_block_forward`, whose ops are verified at the first use of a kind of block on a GPU."""
    if x.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        low = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if low else tensors.qkv_weight.dtype
        trust(_question(x.shape, num_heads, dtype, torch.is_grad_enabled()), x.device)
    return fused_block_forward(x, tensors, num_heads, **options)


@functools.cache
def _question(shape: torch.Size, num_heads: int, dtype: torch.dtype, backward: bool) -> Question:
    """What to verify before blocks of this kind run: few images show it, and processes need not agree on times."""
    return Question(
        FUSED_OPS, Shape(shape[-1], num_heads, shape[-2], batch=8), str(dtype).removeprefix("torch."),
        backward=backward, without=("gamma", "path_scale"), timed=False,
    )  # fmt: skip


class Accelerated(nn.Module):
    """Mixed into a library's module by `accelerate`."""

    adapter: ClassVar[type[Accelerated]]
    original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Made at run time, the class cannot be found by its name: a copy makes it again.
        state = super().__reduce_ex__(protocol)[2:]
        return (_new_accelerated, (self.adapter, self.original), *state)

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, which puts what it gets in the module's place, in the model that it was given."""
        warnings.warn(
            "deitfast: torch.jit.script knows no fused blocks and has put the library's own back into this model. Call "
            "accelerate(model) again to fuse them",
            stacklevel=2,
        )
        module = self.original.__new__(self.original)
        module.__dict__.update(self.__getstate__())
        return module


class AcceleratedBlock(Fusible, Accelerated):
    """A block: `super().forward` is the library's own."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "fused by deitfast"]))


class AcceleratedClassifier(Accelerated):
    """A classifier whose `forward`, its library's own, says that only class tokens are read of the last block."""

    def __init_subclass__(cls) -> None:
        cls.forward = reading_forward(cls.original)  # type: ignore[method-assign]


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _accelerated_class(adapter: type, original: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class `original` that runs as `adapter` has it."""
    if issubclass(adapter, original):  # our own block's
        return adapter
    if (adapter, original) not in _classes:
        members = {"adapter": adapter, "original": original, "__module__": __name__, "__doc__": original.__doc__}
        _classes[adapter, original] = type(original.__name__, (adapter, original), members)
    return _classes[adapter, original]


def _new_accelerated(adapter: type, original: type[nn.Module]) -> nn.Module:
    cls = _accelerated_class(adapter, original)
    return cls.__new__(cls)


# The libraries -------------------------------------------------------------------------------------------------------


class _TimmBlock(AcceleratedBlock):
    """timm.models.vision_transformer.Block: ViT, DeiT, DeiT III."""

    dropouts = ("attn.attn_drop.p", "attn.proj_drop.p", "mlp.drop1.p", "mlp.drop2.p")
    notes = ("calls with an attention mask run the library's own forward",)

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        attn, mlp = block.attn, block.mlp
        yield from problems_by_timms_names(block, "timm", mlp.act)
        for name in ("drop_path1", "drop_path2"):
            yield from wrong_class(name, getattr(block, name), timm=("DropPath",), torch=("Identity",))
        for name, owner, what in (
            ("q_norm", attn, "normalises queries (qk_norm)"),
            ("k_norm", attn, "normalises keys (qk_norm)"),
            ("norm", attn, "normalises the attention's output (scale_attn_norm)"),
            ("gate", attn, "gates the attention's output"),
            ("norm", mlp, "normalises the MLP's hidden layer (scale_mlp_norm)"),
        ):
            if type(getattr(owner, name, None)) not in (nn.Identity, type(None)):
                yield f"it {what}"
        yield from head_problems(attn.proj.out_features, attn.num_heads, attn.scale)
        if attn.qkv.out_features != 3 * attn.qkv.in_features:
            yield f"attn.qkv makes {attn.qkv.out_features} of {attn.qkv.in_features} channels, not three times as many"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal or self.steps_aside(x):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        block: Any = self
        return _verified_forward(
            x,
            block_tensors(block),
            block.attn.num_heads,
            eps1=block.norm1.eps,
            eps2=block.norm2.eps,
            path_scale1_B=_draw_path_scales(block.drop_path1, x),
            path_scale2_B=_draw_path_scales(block.drop_path2, x),
            prefix=tokens_read(self),
        )


def _draw_path_scales(drop_path: Any, x: Tensor) -> Tensor | None:
    """timm's DropPath as a factor for each image, (B,) fp32, from the same draws; None where it does nothing."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training or not drop_path.drop_prob:
        return None
    keep_probability = 1 - drop_path.drop_prob
    path_scale_B = x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep_probability).flatten().float()
    return path_scale_B / keep_probability if drop_path.scale_by_keep and keep_probability > 0 else path_scale_B


_EXACT_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""transformers' names of functions that all compute the same softmax attention."""


class _TransformersLayer(AcceleratedBlock):
    """transformers' ViTLayer and DeiTLayer, which keep queries, keys and values in three linear layers."""

    dropouts = ("attention.attention_dropout", "dropout.p")
    settings = ("attention.config._attn_implementation",)
    notes = (
        "query, key and value weights are joined to one matrix in every forward (a copy of 3 x width^2 values)",
        "calls with an attention mask or output_attentions=True run the library's own forward",
    )

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        attention, mlp = block.attention, block.mlp
        projections = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        width = attention.o_proj.out_features
        yield from head_problems(width, attention.num_attention_heads, attention.scaling)
        yield from layer_problems(
            norms={"layernorm_before": block.layernorm_before, "layernorm_after": block.layernorm_after},
            linears={**projections, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2},
            activation=mlp.activation_fn,
        )
        if attention.head_dim * attention.num_attention_heads != width:
            yield f"its heads are {attention.head_dim} wide, not the width divided by their number"
        for name in ("q_proj", "k_proj", "v_proj"):
            if projections[name].out_features != width:
                yield f"{name} makes {projections[name].out_features} of {width} channels"
        function = attention.config._attn_implementation
        if function not in _EXACT_ATTENTION:
            yield f"its attention is the function registered as {function!r}, which may compute anything"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        block: Any = self
        attention = block.attention
        # Attention weights are recorded by a hook on a module that the kernels never call.
        wants_weights = kwargs.get("output_attentions", getattr(attention.config, "output_attentions", False))
        if attention_mask is not None or wants_weights or self.steps_aside(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        packed = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [linear.bias for linear in packed if linear.bias is not None]
        qkv = Packed(torch.cat([linear.weight for linear in packed]), torch.cat(biases) if biases else None)
        before, after, mlp = block.layernorm_before, block.layernorm_after, block.mlp
        tensors = BlockTensors.of(before, qkv, attention.o_proj, after, mlp.fc1, mlp.fc2)
        return _verified_forward(
            hidden_states, tensors, attention.num_attention_heads,
            eps1=before.eps, eps2=after.eps, prefix=tokens_read(self),
        )  # fmt: skip


class _TorchvisionBlock(AcceleratedBlock):
    """torchvision.models.vision_transformer.EncoderBlock."""

    dropouts = ("self_attention.dropout", "dropout.p", "mlp.2.p", "mlp.4.p")

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        attention, mlp = block.self_attention, block.mlp
        yield from wrong_class("self_attention", attention, torch=("MultiheadAttention",))
        yield from wrong_class("mlp", mlp, torchvision=("MLPBlock",))
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            yield "self_attention has separate, extra or added keys and values"
        if not attention.batch_first:
            yield "self_attention takes tokens before images (batch_first=False)"
        yield from head_problems(attention.embed_dim, attention.num_heads, attention.head_dim**-0.5)
        yield from layer_problems(
            norms={"ln_1": block.ln_1, "ln_2": block.ln_2},
            linears={"self_attention.out_proj": attention.out_proj, "mlp.0": mlp[0], "mlp.3": mlp[3]},
            activation=mlp[1],
        )

    def forward(self, input: Tensor) -> Tensor:
        if self.steps_aside(input):
            return super().forward(input)
        block: Any = self
        attention, mlp = block.self_attention, block.mlp
        qkv = Packed(attention.in_proj_weight, attention.in_proj_bias)
        tensors = BlockTensors.of(block.ln_1, qkv, attention.out_proj, block.ln_2, mlp[0], mlp[3])
        return _verified_forward(
            input, tensors, attention.num_heads, eps1=block.ln_1.eps, eps2=block.ln_2.eps, prefix=tokens_read(self)
        )


_ADAPTERS: dict[str, type[AcceleratedBlock | FusedBlock]] = {
    "deitfast.model.deit.Block": FusedBlock,
    "timm.models.vision_transformer.Block": _TimmBlock,
    "transformers.models.vit.modeling_vit.ViTLayer": _TransformersLayer,
    "transformers.models.deit.modeling_deit.DeiTLayer": _TransformersLayer,
    "torchvision.models.vision_transformer.EncoderBlock": _TorchvisionBlock,
}
"""Block class -> its adapter."""


def _foreign_block(module: nn.Module) -> bool:
    """Whether `module` looks like a transformer block of a known library, of a kind without an adapter."""
    library = type(module).__module__.split(".")[0]
    children = dict(module.named_children())
    has_attention = any(name in children for name in ("attn", "attention", "self_attention", "self_attn"))
    return library in ("timm", "transformers", "torchvision") and has_attention and len(children) > 2


# The call ------------------------------------------------------------------------------------------------------------


@dataclass
class AccelerationReport:
    """What `accelerate` did. Names are those of `model.named_modules()`.

    replaced: blocks that now run fused. already: blocks that did before. left: block -> why it runs unfused. notes:
    what a user of the replaced blocks should know.
    """

    model: str
    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _originals: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give all fused blocks their own class back: those that this call replaced, and those that were before.

        So `accelerate(copy).undo()` serves a model that was copied or loaded. Raises DeitfastError for blocks that
        another library has given a class of its own since (FSDP).
        """
        for block, original in self._originals:
            given = next((cls for cls in type(block).__mro__ if "original" in vars(cls)), None)
            if type(block) not in (given, original):
                raise DeitfastError(
                    f"a block is a {type(block).__name__} now, of which undo knows nothing. Undo before FSDP, or build "
                    "the model anew and load its state dict"
                )
        for block, original in self._originals:
            block.__class__ = original
            block.__dict__.pop("_examination", None)
        self._originals.clear()

    def _give_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self._originals.append((module, type(module)))
        module.__class__ = cls

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.already) + len(self.left)
        lines = [f"deitfast: {len(self.replaced)} of {total} blocks of {self.model} replaced by fused ones"]
        if self.replaced:
            lines.append(f"  replaced: {', '.join(self.replaced)}")
        if self.already:
            lines.append(f"  fused already: {', '.join(self.already)}")
        for reason in dict.fromkeys(self.left.values()):
            names = [name for name, why in self.left.items() if why == reason]
            lines.append(f"  left alone: {', '.join(names)}: {reason}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def accelerate(model: nn.Module, *, verbose: bool = True) -> AccelerationReport:
    """Make the blocks of a Vision Transformer run deitfast's fused kernels, in place, for training and inference.

    model: a timm ViT, DeiT or DeiT III, a Hugging Face ViT or DeiT, a torchvision VisionTransformer, or a deitfast
        model; any module that contains one. Parameters and state dict stay the same objects and keys. Call it before
        torch.compile, DDP or FSDP.
    verbose: print the report.

    What is changed in a block later (LoRA, hooks, pruning, dropout, another dtype) is seen in the next forward: the
    block then runs its own forward, with a warning. Calls of torch.func, forward-mode AD, TorchScript and ONNX do too.

    Returns the report: what was replaced, what was left alone and why; `report.undo()` takes it back. Called again it
    examines fused blocks anew. Warns where every block is left alone; raises DeitfastError where there is no block.
    """
    if torch.cuda.is_available():
        check_compiler()
    report = AccelerationReport(type(model).__name__)
    classifiers: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        name = name or "the model itself"
        if isinstance(module, (AcceleratedBlock, FusedBlock)):
            report._originals.append((module, module.original))
            if problem := examine(module).problem:
                report.left[name] = problem
            else:
                report.already.append(name)
        elif adapter := _ADAPTERS.get(dotted(type(module))):
            if problem := find_problem(adapter, module):
                report.left[name] = problem
            else:
                report.replaced.append(name)
                report.notes = list(dict.fromkeys([*report.notes, *adapter.notes]))
                report._give_class(module, _accelerated_class(adapter, type(module)))
        elif isinstance(module, AcceleratedClassifier):
            report._originals.append((module, module.original))
        elif is_classifier(module):
            classifiers.append(module)
        elif _foreign_block(module):
            report.left[name] = f"{dotted(type(module))} is no plain pre-norm ViT block"
    if classifiers and (report.replaced or report.already):
        report.notes.append(
            "the last block computes the class token alone in calls of the model itself, outside torch.compile; calls "
            "that want other tokens (forward_features, hidden states, hooks, checkpointing) compute all"
        )
        for module in classifiers:
            report._give_class(module, _accelerated_class(AcceleratedClassifier, type(module)))
    if not (report.replaced or report.already or report.left):
        raise DeitfastError(
            f"accelerate found no transformer block in {report.model}. Give it a timm ViT or DeiT, a Hugging Face ViT "
            "or DeiT, a torchvision VisionTransformer, or a deitfast model"
        )
    if verbose:
        print(report)
    if not (report.replaced or report.already):
        warnings.warn(f"deitfast.accelerate replaced no block of {report.model}: {_first(report.left)}", stacklevel=2)
    return report


def _first(left: Mapping[str, str]) -> str:
    name, reason = next(iter(left.items()))
    return f"{name}: {reason}" + (f" (and {len(left) - 1} more)" if len(left) > 1 else "")
