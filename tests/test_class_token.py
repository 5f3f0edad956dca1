"""`accelerate`'s last block: class tokens alone where nothing else is read, every token where anything might be."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deitfast.model import acceleration
from deitfast.model.acceleration import accelerate
from tests.reference import import_timm, import_transformers
from tests.vit_peers import SMALL, assert_accelerates, images, logits, outputs_and_gradients, perturb, small_timm


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What each fused block was asked for since the list was cleared."""
    seen: list[int | None] = []
    forward = acceleration.fused_block_forward

    def watched(*args: Any, prefix: int | None = None, **options: Any) -> Tensor:
        seen.append(prefix)
        return forward(*args, prefix=prefix, **options)

    monkeypatch.setattr(acceleration, "fused_block_forward", watched)
    return seen


def distilled_timm() -> nn.Module:
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 5}
    torch.manual_seed(0)
    return perturb(import_timm().models.deit.VisionTransformerDistilled(**sizes))


def with_teacher() -> nn.Module:
    transformers = import_transformers()

    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**sizes, intermediate_size=128)
    return perturb(transformers.DeiTForImageClassificationWithTeacher(config))


@pytest.mark.parametrize("name", SMALL)
def test_a_classifier_computes_the_class_token_alone(name, prefixes):
    model = SMALL[name]().eval()
    signature = inspect.signature(model.forward)
    assert_accelerates(model, images(model), blocks=2)
    assert prefixes == [None, 1]
    assert inspect.signature(model.forward) == signature


@pytest.mark.parametrize("make", [distilled_timm, with_teacher])
def test_two_heads_read_two_tokens(make, prefixes):
    model = make().eval()
    assert_accelerates(model, images(model), blocks=2)
    assert prefixes == [None, 2]


def test_drop_path_in_training_draws_as_the_library_does(prefixes):
    model = small_timm(drop_path_rate=0.5).train()
    assert_accelerates(model, images(model, batch=8), blocks=2)
    assert prefixes == [None, 1]


def _norm(model: Any) -> nn.Module:
    if hasattr(model, "encoder"):
        return model.encoder.ln
    return model.norm if hasattr(model, "norm") else getattr(model, model.base_model_prefix).layernorm


def _blocks(model: Any) -> Any:
    if hasattr(model, "encoder"):
        return model.encoder.layers
    return model.blocks if hasattr(model, "blocks") else getattr(model, model.base_model_prefix).layers


def hook_on_norm(model: Any) -> None:
    _norm(model).register_forward_hook(lambda module, args, out: out + args[0].mean(1, keepdim=True))


def hook_on_last_block(model: Any) -> None:
    _blocks(model)[-1].register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))


def patched_norm(model: Any) -> None:
    norm = _norm(model)
    norm.forward = lambda x: type(norm).forward(norm, x) + x.mean(1, keepdim=True)


def another_norm(model: Any) -> None:
    class Mixing(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean(1, keepdim=True)

    _norm(model).__class__ = Mixing


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [hook_on_norm, hook_on_last_block, patched_norm, another_norm])
@pytest.mark.parametrize("name", SMALL)
def test_whoever_watches_or_changes_sees_every_token(name, change, when, prefixes):
    model = SMALL[name]().eval()
    x, plain = images(model), copy.deepcopy(model)
    change(plain)
    if when == "before":
        change(model)
    accelerate(model, verbose=False)
    if when == "after":
        change(model)
    torch.testing.assert_close(logits(model, x), logits(plain, x), rtol=1e-4, atol=1e-4)
    assert prefixes == [None, None]


def average(model: Any) -> None:
    model.global_pool = "avg"


def checkpointing(model: Any) -> None:
    model.set_grad_checkpointing()


def other_features(model: Any) -> None:
    original = model.forward_features
    model.forward_features = lambda x, **masks: original(x, **masks).flip(1)


@pytest.mark.parametrize("change", [average, checkpointing, other_features])
def test_timms_settings_of_the_moment_count(change: Callable[[Any], None], prefixes):
    model = small_timm().train()
    x, plain = images(model), copy.deepcopy(model)
    change(plain)
    accelerate(model, verbose=False)
    change(model)
    expected, found = outputs_and_gradients(plain, x), outputs_and_gradients(model, x)
    assert set(prefixes) == {None}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)


def test_timms_features_are_of_every_token(prefixes):
    model = small_timm().eval()
    x = images(model)
    features, layers = model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
    accelerate(model, verbose=False)
    logits(model, x)
    torch.testing.assert_close(model.forward_features(x), features, rtol=1e-4, atol=1e-4)
    for found, expected in zip(model.forward_intermediates(x, intermediates_only=True), layers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert prefixes == [None, 1, *[None] * 4]


@pytest.mark.parametrize("how", ["argument", "setting", "number"])
@pytest.mark.parametrize("name", ["vit", "deit"])
def test_transformers_hidden_states_are_of_every_token(name, how, prefixes):
    model = SMALL[name]().eval()
    x, plain = images(model), copy.deepcopy(model)
    asked = {"argument": {"output_hidden_states": True}, "setting": {}, "number": {"output_hidden_states": 2}}[how]
    accelerate(model, verbose=False)
    for one in (model, plain):
        one.config.output_hidden_states = how == "setting"
    expected, found = plain(x, **asked).hidden_states, model(x, **asked).hidden_states
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert prefixes == [None, None]
    model.config.output_hidden_states = False
    logits(model, x)  # transformers' recording hooks stay on the blocks, and record nothing
    assert prefixes[2:] == [None, 1]


def test_transformers_checkpointing_computes_every_token(prefixes):
    model = SMALL["vit"]().train()
    x, plain = images(model), copy.deepcopy(model)
    accelerate(model, verbose=False)
    for one in (model, plain):
        one.gradient_checkpointing_enable()
    expected, found = outputs_and_gradients(plain, x), outputs_and_gradients(model, x)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
    assert set(prefixes) == {None}


def test_another_models_call_does_not_shorten_this_one(prefixes):
    inner, outer = small_timm().eval(), small_timm().eval()
    x = images(outer)
    expected = inner.forward_features(x)
    for model in (inner, outer):
        accelerate(model, verbose=False)
    found: list[Tensor] = []
    outer.patch_embed.register_forward_hook(lambda *_: found.append(inner.forward_features(x)))
    logits(outer, x)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert prefixes == [None, None, None, 1]
