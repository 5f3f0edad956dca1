"""Vision Transformers of other libraries for the tests, and the comparison of a fused model with its eager self."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deitfast.model.acceleration import accelerate
from tests.kernels.tolerance import assert_close_to_float64
from tests.reference import import_timm, import_torchvision, import_transformers


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value: heads, biases and LayerScale often start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return perturb(import_timm().create_model(name, **kwargs))


def small_timm(**kwargs: Any) -> nn.Module:
    """Two blocks of two heads, 10 tokens: small enough for Triton's interpreter."""
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 5}
    torch.manual_seed(0)
    return perturb(import_timm().models.vision_transformer.VisionTransformer(**(sizes | kwargs)))


def transformers_model(kind: str, attn_implementation: str = "sdpa", **kwargs: Any) -> nn.Module:
    transformers = import_transformers()

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**kwargs)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    model.set_attn_implementation(attn_implementation)
    return perturb(model)


def small_transformers(kind: str, attn_implementation: str = "sdpa", **kwargs: Any) -> nn.Module:
    sizes = {"image_size": 24, "patch_size": 8, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers_model(kind, attn_implementation, **(sizes | {"intermediate_size": 128} | kwargs))


def torchvision_model(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return perturb(import_torchvision().models.VisionTransformer(**kwargs))


def small_torchvision(**kwargs: Any) -> nn.Module:
    sizes = {"image_size": 24, "patch_size": 8, "hidden_dim": 64, "num_heads": 2, "num_layers": 2, "mlp_dim": 128}
    return torchvision_model(**(sizes | {"num_classes": 5} | kwargs))


SMALL: dict[str, Callable[..., nn.Module]] = {
    "timm": small_timm,
    "deit": lambda: small_transformers("DeiT"),
    "vit": lambda: small_transformers("ViT"),
    "torchvision": small_torchvision,
}


def images(model: nn.Module, batch: int = 2, size: int = 24, seed: int = 1) -> Tensor:
    parameter = next(model.parameters())
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(parameter)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    out = getattr(out, "logits", out)
    return torch.cat(out) if isinstance(out, tuple) else out


def outputs_and_gradients(model: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """The logits and the gradient of a loss of them for every parameter and the input, drop-path seeded."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = logits(model, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    (out * weights).sum().backward()
    found = {"logits": out.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_accelerates(model: nn.Module, x: Tensor, blocks: int) -> None:
    """All `blocks` are replaced, and outputs and gradients stay as near to float64 as the eager model's."""
    exact = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    eager = outputs_and_gradients(model, x)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = accelerate(model, verbose=False)
    assert len(report.replaced) == blocks, str(report)
    assert not report.left, str(report)
    fused = outputs_and_gradients(model, x)
    assert list(model.state_dict()) == keys
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert fused.keys() == eager.keys()
    assert any(not torch.equal(fused[name], eager[name]) for name in eager) or blocks == 0
    for name in eager:
        # A bias on the keys shifts all scores of a query alike: its gradient is zero, and what is left is rounding.
        magnitude = exact[name.replace("k_proj", "v_proj")]
        factor = 2.0 if name == "logits" else 3.0
        assert_close_to_float64(name, fused[name], exact[name], eager[name], factor, magnitude=magnitude)
