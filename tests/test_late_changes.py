"""What is changed in a model after it was fused has its effect all the same, and is told once."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from deitfast import create_model
from deitfast.errors import DeitfastError
from deitfast.kernels import attention, layernorm_attention, layernorm_mlp
from deitfast.model import fitness
from deitfast.model.acceleration import AcceleratedBlock, accelerate
from deitfast.model.fitness import Fusible
from deitfast.model.fused import FusedBlock, fuse
from tests.reference import import_timm
from tests.vit_peers import SMALL, images, logits, perturb, small_timm, small_transformers


def small_deitfast() -> nn.Module:
    torch.manual_seed(0)
    return perturb(create_model("deit_tiny_patch16_224", image_size=32, num_classes=5, depth=2, fused=False))


ALL: dict[str, Callable[[], nn.Module]] = SMALL | {"deitfast": small_deitfast}


def photos(name: str, model: nn.Module, batch: int = 2) -> Tensor:
    return images(model, batch, size=32 if name == "deitfast" else 24)


def first_block(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, Fusible) or type(m).__name__ in BLOCKS)


BLOCKS = ("Block", "ViTLayer", "DeiTLayer", "EncoderBlock")


def linears(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, attribute) of every linear layer of a block whose module is called."""
    return [
        (parent, name)
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


def replace_linear(block: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for parent, name in linears(block):
        old = getattr(parent, name)
        new = Doubled(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        setattr(parent, name, new)


def patch_instance(block: Any) -> None:
    parent, name = linears(block)[-1]
    linear = getattr(parent, name)
    linear.forward = lambda x: 3 * nn.functional.linear(x, linear.weight, linear.bias)


def weight_norm(block: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parent, name in linears(block)[-1:]:
            nn.utils.weight_norm(getattr(parent, name))
            getattr(parent, name).weight_g.data.mul_(1.5)


def parametrised(block: Any) -> None:
    for parent, name in linears(block)[-1:]:
        nn.utils.parametrizations.weight_norm(getattr(parent, name))
        getattr(parent, name).parametrizations.weight.original0.data.mul_(1.5)


def pruned(block: Any) -> None:
    for parent, name in linears(block)[-1:]:
        torch.nn.utils.prune.l1_unstructured(getattr(parent, name), "weight", 0.5)
        getattr(parent, name).weight_orig.data.mul_(2)


def forward_hook(block: Any) -> None:
    parent, name = linears(block)[-1]
    getattr(parent, name).register_forward_hook(lambda module, args, out: 2 * out)


def forward_pre_hook(block: Any) -> None:
    parent, name = linears(block)[-1]
    getattr(parent, name).register_forward_pre_hook(lambda module, args: (2 * args[0],))


def wrapped_child(block: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return -self.inner(*args, **kwargs)

    block.mlp = Wrapper(block.mlp)


def other_activation(block: Any) -> None:
    for parent in block.modules():
        for name, child in list(parent.named_children()):
            if "GELU" in type(child).__name__:
                setattr(parent, name, nn.SiLU())


CHANGES = {
    "another class": replace_linear,
    "patched forward": patch_instance,
    "weight norm by hook": weight_norm,
    "weight norm by parametrisation": parametrised,
    "pruning": pruned,
    "forward hook": forward_hook,
    "forward pre-hook": forward_pre_hook,
    "wrapped child": wrapped_child,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL)
def test_a_change_after_fusing_has_the_effect_that_it_has_without(name, change):
    plain = ALL[name]().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    x = photos(name, plain)
    before = logits(fused, x)
    for model in (plain, fused):
        CHANGES[change](first_block(model))
    with pytest.warns(UserWarning, match="runs its unfused forward"):
        after = logits(fused, x)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, logits(plain, x), rtol=1e-4, atol=1e-4 * before.abs().max().item())
    other = [m for m in fused.modules() if isinstance(m, Fusible)][1]
    assert not other.steps_aside(torch.zeros(1, 2, 64)), "only the block that changed runs unfused"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(fused, x), after), "told once"
    again = accelerate(fused, verbose=False)
    assert list(again.left) == [again_name for again_name, m in fused.named_modules() if m is first_block(fused)]
    assert len(again.already) == 1


@pytest.mark.parametrize("name", ["timm", "vit", "torchvision"])
def test_another_activation_has_its_effect(name):
    plain = ALL[name]().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    for model in (plain, fused):
        other_activation(first_block(model))
    x = photos(name, plain)
    with pytest.warns(UserWarning, match="activation is a .*SiLU"):
        torch.testing.assert_close(logits(fused, x), logits(plain, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_lora_after_fusing_trains_as_without(name):
    peft = pytest.importorskip("peft")
    targets = {"timm": ["qkv"], "deitfast": ["qkv"], "torchvision": ["mlp.0", "mlp.3"]}.get(name, ["q_proj", "v_proj"])
    plain = ALL[name]()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    x, target = photos(name, plain, 4), torch.tensor([0, 1, 0, 1])
    losses = []
    for model in (plain, fused):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-3)
        found = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(logits(adapted, x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
        learned = [p.norm().item() for n, p in adapted.named_parameters() if "lora_B" in n]
        assert learned
        assert min(learned) > 0
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_lora_merged_and_unloaded_leaves_a_fused_model_again():
    peft = pytest.importorskip("peft")
    model = small_timm().eval()
    accelerate(model, verbose=False)
    x = images(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match=r"attn\.qkv is a peft"):
        expected = logits(adapted, x)
    merged = adapted.merge_and_unload()
    assert not any(m.steps_aside(x) for m in merged.modules() if isinstance(m, Fusible))
    torch.testing.assert_close(logits(merged, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_our_own_model_is_seen_whenever_it_comes(when):
    peft = pytest.importorskip("peft")
    plain = small_deitfast().eval()
    fused = copy.deepcopy(plain)
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    torch.manual_seed(1)
    expected = peft.get_peft_model(plain, config).eval()
    if when == "after":
        accelerate(fused, verbose=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(fused, config).eval()
    if when == "before":
        with pytest.warns(UserWarning, match=r"attn\.qkv is a peft"):
            assert not accelerate(adapted, verbose=False).replaced
    x = images(plain, size=32)
    torch.testing.assert_close(adapted(x), expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm", "vit", "torchvision"])
def test_dropout_that_is_switched_on_later_drops(name):
    model = ALL[name]().train()
    accelerate(model, verbose=False)
    x = photos(name, model)
    assert torch.equal(logits(model, x), logits(model, x))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    with pytest.warns(UserWarning, match="dropout .* is 0.5; set it to 0"):
        assert not torch.equal(logits(model, x), logits(model, x))
    model.eval()
    assert torch.equal(logits(model, x), logits(model, x))
    assert not any(m.steps_aside(x) for m in model.modules() if isinstance(m, Fusible)), "fused in evaluation"


def test_attention_dropout_of_transformers_counts():
    model = small_transformers("ViT").train()
    accelerate(model, verbose=False)
    for layer in model.vit.layers:
        layer.attention.attention_dropout = 0.5
    with pytest.warns(UserWarning, match=r"dropout attention\.attention_dropout is 0.5"):
        assert not torch.equal(logits(model, images(model)), logits(model, images(model)))


@pytest.mark.parametrize("name", ALL)
def test_double_precision_is_computed_in_double_precision(name):
    plain = ALL[name]().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    plain, fused = plain.double(), fused.double()
    x = photos(name, plain)
    with pytest.warns(UserWarning, match="is torch.float64"):
        assert torch.equal(logits(fused, x), logits(plain, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(fused.float(), x.float())
    assert not first_block(fused).steps_aside(x), "fused again in single precision"


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_dynamic_quantisation_quantises():
    plain = small_timm().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    quantised = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in (plain, fused)]
    with pytest.warns(UserWarning, match=r"attn\.qkv is a torch\.ao\.nn\.quantized"):
        assert torch.equal(quantised[1](images(plain)), quantised[0](images(plain)))


def test_timms_attention_extraction_works():
    from timm.utils import AttentionExtract

    import_timm().layers.set_fused_attn(False)
    try:
        plain = small_timm().eval()
    finally:
        import_timm().layers.set_fused_attn(True)
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    x = images(plain)
    expected, actual = (AttentionExtract(model, method="hook")(x) for model in (plain, fused))
    assert list(actual) == list(expected)
    assert len(expected) == 2
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_patched_for_a_whole_class_is_seen(when, monkeypatch):
    attention_class = type(small_timm().blocks[0].attn)
    model = small_timm().eval()

    def patch() -> None:
        original = attention_class.forward
        monkeypatch.setattr(attention_class, "forward", lambda self, *a, **k: 2 * original(self, *a, **k))

    if when == "after":
        accelerate(model, verbose=False)
        patch()
    else:
        patch()
        with pytest.warns(UserWarning, match="attn's forward is tests.test_late_changes's"):
            assert not accelerate(model, verbose=False).replaced
    twin = small_timm().eval()
    assert torch.equal(logits(model, images(model)), logits(twin, images(model)))


def test_an_attention_function_of_ones_own_is_seen():
    from transformers import AttentionInterface

    def halved(module, query, key, value, mask, **kwargs):
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2) / 2, None

    AttentionInterface.register("halved_for_a_test", halved)
    plain = small_transformers("ViT").eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    for model in (plain, fused):
        model.config._attn_implementation = "halved_for_a_test"
    with pytest.warns(UserWarning, match="registered as 'halved_for_a_test'"):
        assert torch.equal(logits(fused, images(plain)), logits(plain, images(plain)))


def test_hooks_on_all_modules_are_called():
    calls = []
    model = small_timm().eval()
    accelerate(model, verbose=False)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    try:
        logits(model, images(model))
    finally:
        hook.remove()
    assert calls.count("Mlp") == 2
    assert not first_block(model).steps_aside(images(model))


def test_flops_are_counted_as_without():
    from torch.utils.flop_counter import FlopCounterMode

    plain = small_timm().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    counts = []
    for model in (plain, fused):
        with FlopCounterMode(display=False) as counter:
            logits(model, images(plain))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# Transforms, tracing and exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_transforms_of_torch_func_give_the_plain_models_derivatives(name):
    plain = ALL[name]().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    x = photos(name, plain)

    @torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the only one with a forward-mode derivative
    def derivatives(model: nn.Module) -> list[Tensor]:
        parameters = {k: v.detach() for k, v in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
            out = torch.func.functional_call(model, parameters, (one[None],))
            return getattr(out, "logits", out).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        direction = torch.func.jvp(lambda y: logits(model, y), (x,), (torch.ones_like(x),))[1]
        return [direction, *each.values()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = derivatives(fused)
    for actual, expected in zip(found, derivatives(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert found[0].abs().max() > 0.1


def test_forward_mode_gives_the_plain_models_derivative():
    plain = small_timm().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    x = images(plain)
    tangents = []
    for model in (plain, fused):
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(torch.autograd.forward_ad.unpack_dual(logits(model, dual)).tangent)
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-4)


OPS = {
    "attention": lambda x: attention(torch.cat([x] * 3, 2), 1),
    "layernorm_attention": lambda x: layernorm_attention(
        x, x[0, 0], x[0, 0], torch.ones(192, 64), None, torch.ones(64, 64), None, 1
    ),
    "layernorm_mlp": lambda x: layernorm_mlp(x, x[0, 0], x[0, 0], torch.ones(128, 64), None, torch.ones(64, 128), None),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_refuses_forward_mode_and_a_second_derivative_in_words(name):
    x = torch.randn(1, 4, 64)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(OPS[name], (x,), (x,))
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(OPS[name](y).square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated.*accelerate\(model\)\.undo\(\)"):
        first.square().sum().backward()


def test_a_traced_model_is_the_librarys_own():
    model = small_timm().eval()
    x = images(model)
    expected = logits(model, x)
    accelerate(model, verbose=False)
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), expected)
    assert "deitfast::" not in str(traced.inlined_graph)


def test_a_model_traced_by_fx_is_the_librarys_own_and_says_so(monkeypatch):
    monkeypatch.setattr(fitness, "_told", set())
    model = small_timm().eval()
    x = images(model)
    expected = logits(model, x)
    accelerate(model, verbose=False)
    with pytest.warns(UserWarning, match=r"unfused forward: torch\.fx and its like trace PyTorch's own"):
        traced = torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None, "is_causal": False})
    assert torch.equal(traced(x), expected)
    assert "deitfast" not in traced.code


def test_fx_keeps_whole_what_timm_says_it_must_not_trace(timm):
    from timm.layers import get_notrace_functions, get_notrace_modules

    model = timm.create_model("test_vit").eval()  # its positions are interpolated by code that reads the image's size
    x = torch.randn(1, 3, 64, 64)
    expected = logits(model, x)
    assert accelerate(model, verbose=False).replaced

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return type(module) in get_notrace_modules() or super().is_leaf_module(module, name)

    graph = Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(model)
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_model_is_the_librarys_own():
    model = small_timm().eval()
    x = images(model)
    expected = logits(model, x)
    accelerate(model, verbose=False)
    with pytest.warns(UserWarning, match="put the library's own back"):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), expected)
    assert len(accelerate(model, verbose=False).replaced) == 2
    assert torch.equal(scripted(x), expected)


@pytest.mark.slow
def test_onnx_takes_a_fused_model(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small_timm().eval()
    x = images(model)
    accelerate(model, verbose=False)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), logits(model, x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["timm", "vit"])
def test_a_compiled_model_sees_lora_that_came_after_fusing(name):
    peft = pytest.importorskip("peft")
    plain = ALL[name]().eval()
    fused = copy.deepcopy(plain)
    accelerate(fused, verbose=False)
    x = images(plain)
    compiled = torch.compile(fused, backend="eager")
    logits(compiled, x)
    config = peft.LoraConfig(r=4, target_modules=["qkv"] if name == "timm" else ["q_proj"], init_lora_weights=False)
    found = []
    for model in (plain, fused):
        torch.manual_seed(1)
        found.append(peft.get_peft_model(model, config).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(compiled, x), logits(plain, x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# Taking it back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_copies_and_loaded_models_are_unfused_again(name):
    model = ALL[name]().eval()
    classes = [type(m) for m in model.modules()]
    x = photos(name, model)
    expected = logits(model, x)
    accelerate(model, verbose=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        report = accelerate(twin, verbose=False)
        assert len(report.already) == 2
        report.undo()
        assert [type(m) for m in twin.modules()] == classes
        assert torch.equal(logits(twin, x), expected)
    assert sum(isinstance(m, (AcceleratedBlock, FusedBlock)) for m in model.modules()) == 2


def test_undo_names_what_another_library_made_of_the_blocks():
    model = small_timm()
    report = accelerate(model, verbose=False)
    block: Any = model.blocks[1]
    block.__class__ = type("FSDPBlock", (type(block),), {})
    with pytest.raises(DeitfastError, match="is a FSDPBlock now"):
        report.undo()
    assert isinstance(model.blocks[0], AcceleratedBlock), "all or nothing"


# Patches, on their way past the convolution's module ----------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replace_by(make: Callable[..., nn.Module]) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        old = model.patch_embed.proj
        new = make(3, old.out_channels, old.kernel_size, old.stride)
        new.load_state_dict(old.state_dict(), strict=False)
        model.patch_embed.proj = new

    return change


def _weight_norm(model: Any) -> None:
    torch.nn.utils.weight_norm(model.patch_embed.proj)
    with torch.no_grad():
        model.patch_embed.proj.weight_g.mul_(3)  # the weight itself is stale until the next forward


def _low_rank(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), model.patch_embed)


EMBEDDING_CHANGES: dict[str, Callable[[Any], Any]] = {
    "subclass": _replace_by(Doubled),
    "no bias": _replace_by(partial(nn.Conv2d, bias=False)),
    "weight-norm": _weight_norm,
    "parametrised": lambda model: torch.nn.utils.parametrizations.weight_norm(model.patch_embed.proj),
    "LoRA": _low_rank,
    "hook on the convolution": lambda m: m.patch_embed.proj.register_forward_hook(lambda *a: 2 * a[2]),
    "hook on the embedding": lambda m: m.patch_embed.register_forward_hook(lambda *a: 2 * a[2]),
    "input hook": lambda m: m.patch_embed.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    "patched": lambda model: setattr(model.patch_embed, "forward", lambda x: torch.ones(len(x), 4, 192)),
    "padding": lambda model: setattr(model.patch_embed.proj, "padding", (0, 0)),  # no change at all
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", EMBEDDING_CHANGES)
def test_what_is_changed_in_the_patch_embedding_works_on_patches(change: str, fused: bool) -> None:
    """As it does on images, whose way goes through the module: what training feeds are patches."""
    if change == "LoRA":
        pytest.importorskip("peft")
    model: Any = small_deitfast().eval()
    if fused:
        fuse(model)
    batch = photos("deitfast", model)
    patches = F.unfold(batch, 16, stride=16).transpose(1, 2).contiguous()
    with torch.no_grad():
        before = model(patches)
        EMBEDDING_CHANGES[change](model)
        after = model(patches)
        torch.testing.assert_close(after, model(batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(before, after) == (change == "padding") or change == "parametrised"
