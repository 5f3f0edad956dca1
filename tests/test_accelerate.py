"""`accelerate` on timm, Hugging Face and torchvision: what it replaces, keeps and leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from deitfast.errors import DeitfastError
from deitfast.model import acceleration
from deitfast.model.acceleration import AcceleratedBlock, accelerate
from tests.reference import import_timm, import_torchvision
from tests.vit_peers import (
    SMALL,
    assert_accelerates,
    images,
    logits,
    outputs_and_gradients,
    perturb,
    small_timm,
    small_torchvision,
    small_transformers,
    timm_model,
    torchvision_model,
    transformers_model,
)

# Same outputs and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "blocks", "batch"),
    [
        ("deit_tiny_patch16_224", {}, 12, 1),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}, 2, 1),
        ("deit3_small_patch16_224", {"depth": 2, "drop_path_rate": 0.5}, 2, 3),
        ("vit_base_patch16_224", {"depth": 1}, 1, 1),
    ],
)
def test_timm_models(name, options, blocks, batch):
    model = timm_model(name, **options).train()
    assert_accelerates(model, images(model, batch, size=224), blocks)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["DeiT", "ViT"])
def test_transformers_models(kind, attn_implementation):
    model = small_transformers(kind, attn_implementation).train()
    assert_accelerates(model, images(model), blocks=2)


@pytest.mark.parametrize("kind", ["DeiT", "ViT"])
def test_transformers_default_configurations(kind):
    model = transformers_model(kind, num_hidden_layers=1).train()
    assert_accelerates(model, images(model, batch=1, size=224), blocks=1)


def test_torchvision_vit_b_16():
    model = torchvision_model(image_size=224, patch_size=16, num_layers=1, num_heads=12, hidden_dim=768, mlp_dim=3072)
    assert_accelerates(model.train(), images(model, batch=1, size=224), blocks=1)


@pytest.mark.slow
def test_whole_models_replace_every_block():
    """Models at full size, forward only."""
    models = {
        "deit3_small_patch16_224": timm_model("deit3_small_patch16_224"),
        "DeiT": transformers_model("DeiT"),
        "vit_b_16": perturb(import_torchvision().models.vit_b_16()),
    }
    for name, model in models.items():
        model.eval()
        x = images(model, batch=1, size=224)
        with torch.no_grad():
            expected = logits(model, x)
            assert len(accelerate(model, verbose=False).replaced) == 12, name
            torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("library", SMALL)
def test_autocast_is_as_near_to_float64_as_eager_under_autocast(library):
    model = SMALL[library]().eval()
    x = images(model)
    exact = logits(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = logits(model, x)
        accelerate(model, verbose=False)
        fused = logits(model, x)
        fused.float().sum().backward()
    assert fused.dtype == eager.dtype
    assert torch.dist(fused.double(), exact) <= 2 * torch.dist(eager.double(), exact) + 2**-8 * exact.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) > 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bit(dtype):
    model = small_timm().to(dtype).eval()
    assert_accelerates(model, images(model), blocks=2)


# What stays as it was ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", SMALL)
def test_idempotent_and_undone(library):
    model = SMALL[library]().eval()
    x = images(model)
    before, classes = logits(model, x), [type(module) for module in model.modules()]
    first = accelerate(model, verbose=False)
    after = logits(model, x)
    second = accelerate(model, verbose=False)
    assert second.replaced == []
    assert second.already == first.replaced
    assert torch.equal(logits(model, x), after)
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in classes]
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    first.undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("library", SMALL)
def test_copies_run_fused_on_their_own_parameters(library):
    model = SMALL[library]().eval()
    accelerate(model, verbose=False)
    x = images(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert sum(isinstance(module, AcceleratedBlock) for module in twin.modules()) == 2
        assert torch.equal(logits(twin, x), logits(model, x))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(logits(twin, x), logits(model, x))


@pytest.mark.parametrize("library", SMALL)
def test_weights_move_between_a_fused_and_an_eager_model(library):
    fused, eager = SMALL[library]().eval(), SMALL[library]().eval()
    accelerate(fused, verbose=False)
    perturb(fused, seed=9)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    eager.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(logits(fused, images(fused)), logits(eager, images(eager)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", SMALL)
def test_torch_compile_sees_the_ops_of_the_whole_model_in_one_graph(library, monkeypatch):
    model = SMALL[library]().eval()
    accelerate(model, verbose=False)
    ops = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        ops.extend(node.target for node in graph.graph.nodes if "deitfast" in str(node.target))
        return graph

    x = images(model)
    compiled = logits(torch.compile(model, backend=backend, fullgraph=True), x)
    monkeypatch.setattr(acceleration, "tokens_read", lambda block: None)  # a compiled model computes every token
    assert torch.equal(compiled, logits(model, x))
    assert len(ops) == 2 * 2  # blocks, halves a block


def test_torch_compile_trains_a_fused_block():
    model = small_timm(depth=1, init_values=0.3, drop_path_rate=0.0).train()
    accelerate(model, verbose=False)
    block = model.blocks[0]
    x = torch.randn(2, 10, 64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected, actual = (torch.autograd.grad(run(x).sum(), list(block.parameters())) for run in (block, compiled))
    torch.testing.assert_close(actual, expected)


def test_drop_path_drops_whole_branches_at_its_rate_in_training_only():
    model = small_timm(depth=1, drop_path_rate=0.0)
    block = model.blocks[0]
    drop_path = import_timm().layers.DropPath(0.25)
    block.drop_path1, block.drop_path2 = drop_path, import_timm().layers.DropPath(1.0)
    accelerate(model, verbose=False)
    x = torch.randn(1, 4, 64).expand(2000, 4, 64)
    torch.manual_seed(0)
    change = block.train()(x) - x
    dropped = (change == 0).flatten(1).all(1)
    assert 0.22 < dropped.float().mean() < 0.28
    full = block.eval()(x[:1])
    drop_path.drop_prob = 0.0
    block.drop_path2.train()
    without_mlp = block(x[:1]) - x[:1]  # the second branch is always dropped in training
    torch.testing.assert_close(change[~dropped][:1], without_mlp / 0.75)
    assert not torch.allclose(full, without_mlp + x[:1])


def test_calls_with_a_mask_run_the_library():
    model = small_timm(depth=1)
    block = model.blocks[0]
    x, mask = torch.randn(2, 10, 64), torch.randn(10, 10)
    expected = block(x, attn_mask=mask), block(x, is_causal=True)
    accelerate(model, verbose=False)
    assert torch.equal(block(x, attn_mask=mask), expected[0])
    assert torch.equal(block(x, is_causal=True), expected[1])


def test_transformers_attention_weights_and_hidden_states_are_still_recorded():
    model = small_transformers("ViT", "eager").eval()
    x = images(model)
    expected = model(x, output_attentions=True, output_hidden_states=True)
    accelerate(model, verbose=False)
    actual = model(x, output_attentions=True, output_hidden_states=True)
    assert len(actual.attentions) == len(expected.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(actual.attentions, expected.attentions, strict=True))
    fused = model(x, output_hidden_states=True)
    for a, b in zip(fused.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_transformers_gradient_checkpointing_still_checkpoints():
    model = small_transformers("ViT").train()
    expected = outputs_and_gradients(model, images(model))
    accelerate(model, verbose=False)
    model.gradient_checkpointing_enable()
    calls = []
    for layer in model.vit.layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, f=checkpoint: (calls.append(1), f(*args))[1]
    actual = outputs_and_gradients(model, images(model))
    assert len(calls) == 2
    torch.testing.assert_close(actual["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual["input"], expected["input"], rtol=1e-3, atol=1e-5)


def test_training_goes_on_with_the_same_optimiser():
    losses: dict[bool, list[float]] = {True: [], False: []}
    for accelerated, found in losses.items():
        model = small_timm().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(6):
            if accelerated and step == 3:
                accelerate(model, verbose=False)
            loss = logits(model, images(model, batch=4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < 0.2 * losses[True][0]


# What is left alone --------------------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    model = small_timm()
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: None)
    return model


def patched() -> nn.Module:
    model = small_timm()
    for block in model.blocks:
        block.forward = lambda x: x
    return model


def adapted() -> nn.Module:
    class LoraLinear(nn.Linear):
        pass

    model = small_timm()
    for block in model.blocks:
        block.mlp.fc1 = LoraLinear(64, 256)
    return model


def renamed() -> nn.Module:
    model = small_transformers("ViT")
    for layer in model.vit.layers:
        layer.attention.query = layer.attention.q_proj
        del layer.attention.q_proj
    return model


def parametrised() -> nn.Module:
    model = small_timm()
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.attn.proj)
    return model


UNSUPPORTED = {
    "qk_norm": (lambda: small_timm(qk_norm=True), r"normalises queries \(qk_norm\)"),
    "attention dropout": (lambda: small_timm(attn_drop_rate=0.1), r"dropout attn.attn_drop is 0.1; set it to 0"),
    "dropout": (lambda: small_timm(proj_drop_rate=0.1), r"dropout attn.proj_drop is 0.1"),
    "tanh GELU": (lambda: small_timm(act_layer=lambda: nn.GELU(approximate="tanh")), "tanh approximation"),
    "SiLU": (lambda: small_timm(act_layer=nn.SiLU), "activation is a torch.nn.modules.activation.SiLU"),
    "head dimension": (lambda: small_timm(num_heads=4), "head dimension 16; supported are 32, 64"),
    "RMS norm": (lambda: small_timm(norm_layer=import_timm().layers.RmsNorm), "norm1 is a timm.layers.norm.RmsNorm"),
    "swiglu": (lambda: small_timm(mlp_layer=import_timm().layers.SwiGLU), "mlp is a timm.layers.mlp.SwiGLU"),
    "float64": (lambda: small_timm().double(), "is torch.float64"),
    "hook": (hooked, "attn has a hook"),
    "patched forward": (patched, "its forward is patched"),
    "replaced linear": (adapted, "mlp.fc1 is a tests.test_accelerate.LoraLinear"),
    "parametrised linear": (parametrised, "attn.proj is a .*ParametrizedLinear"),
    "transformers activation": (lambda: small_transformers("ViT", hidden_act="gelu_new"), "NewGELUActivation"),
    "transformers dropout": (lambda: small_transformers("DeiT", hidden_dropout_prob=0.1), "dropout dropout is 0.1"),
    "another version's layout": (renamed, "not the layout this version of deitfast knows: .*q_proj"),
    "torchvision dropout": (lambda: small_torchvision(dropout=0.1), "dropout dropout is 0.1"),
    "relative position bias": (
        lambda: import_timm().create_model("beit_base_patch16_224", depth=1, embed_dim=64, num_heads=2),
        "timm.models.beit.Block is no plain pre-norm ViT block",
    ),
    "windows": (
        lambda: import_torchvision().models.SwinTransformer([4, 4], 32, [2], [1], [7, 7]),
        "SwinTransformerBlock is no plain pre-norm ViT block",
    ),
}


@pytest.mark.parametrize("variant", UNSUPPORTED)
def test_unsupported_blocks_are_left_alone_with_the_reason(variant):
    build, reason = UNSUPPORTED[variant]
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match=reason):
        report = accelerate(model, verbose=False)
    assert report.replaced == []
    assert report.left
    assert [type(module) for module in model.modules()] == classes


def test_one_odd_block_among_others_is_left_alone(capsys):
    model = small_timm()
    model.blocks[1].mlp.act = nn.ReLU()
    x = images(model)
    expected = logits(model, x)
    report = accelerate(model)
    assert report.replaced == ["blocks.0"]
    assert report.left == {"blocks.1": "activation is a torch.nn.modules.activation.ReLU"}
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().out == f"{report}\n"
    assert str(report).splitlines()[:3] == [
        "deitfast: 1 of 2 blocks of VisionTransformer replaced by fused ones",
        "  replaced: blocks.0",
        "  left alone: blocks.1: activation is a torch.nn.modules.activation.ReLU",
    ]


def test_a_model_without_blocks_is_an_error():
    with pytest.raises(DeitfastError, match="found no transformer block in Sequential"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))


def test_a_deitfast_model_is_accelerated_and_no_library_nor_compiler_imported():
    program = """
import sys
import torch
from deitfast.model.acceleration import accelerate
from deitfast.model.deit import DeiT
model = DeiT(width=64, depth=2, num_heads=1, image_size=16, patch_size=8, num_classes=3)
report = accelerate(model, verbose=False)
assert report.replaced == ["blocks.0", "blocks.1"], report
model(torch.rand(1, 3, 16, 16)).sum().backward()
assert model.blocks[0].mlp.fc1.weight.grad.any()
report.undo()
assert not {"timm", "transformers", "torchvision", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
