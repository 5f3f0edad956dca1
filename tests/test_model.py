"""The model against timm: names, logits, initialisation, position embeddings, weight files and their errors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import deitfast
from deitfast.errors import DeitfastError
from deitfast.model.deit import path_scales, resize_pos_embed
from deitfast.model.factory import create_model
from deitfast.model.weights import load_weights

TIMM_NAMES = [name for name in deitfast.list_models() if "_384" not in name or name.startswith("deit_base")]
OURS_ALONE = ("deit_digits", "deit_mini", "deit_micro")
TIMM_NAMES = [
    name for name in TIMM_NAMES if not name.startswith(OURS_ALONE) and ("deit3" not in name or "small" in name)
]


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_names_and_shapes_equal_timms(name: str, timm) -> None:
    with torch.device("meta"):
        theirs, ours = (create(name, num_classes=11).state_dict() for create in (timm.create_model, create_model))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_logits_equal_timms(name: str, timm) -> None:
    theirs = timm.create_model(name, num_classes=11, depth=2).eval()
    randomise(theirs)
    ours = create_model(name, num_classes=11, depth=2).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, ours.image_size, ours.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = theirs(images), ours(images)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        tokens = theirs.forward_features(images)
        torch.testing.assert_close(ours.forward_features(images), tokens, rtol=1e-4, atol=1e-5)
        features = ours.extract_feat(images)
    assert len(features) == ours.num_prefix_tokens
    for i, feature in enumerate(features):
        torch.testing.assert_close(feature, tokens[:, i], rtol=1e-4, atol=1e-5)


def test_layer_scale_equals_timms_deit3(timm) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", init_values=0.3, num_classes=5).eval()
    ours = create_model("deit_tiny_patch16_224", num_classes=5, layer_scale=0.3).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_initialisation_has_the_papers_statistics() -> None:
    torch.manual_seed(0)
    model = create_model("deit_tiny_distilled_patch16_224")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name.startswith("patch_embed"):
            bound = (3 * 16 * 16) ** -0.5  # PyTorch's default for a convolution: uniform within 1 / sqrt(fan in)
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.9 * bound
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_distilled_model_returns_both_heads_in_training_and_their_mean_in_evaluation() -> None:
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        logits, logits_dist = model.train()(images)
        mean = model.eval()(images)
    torch.testing.assert_close(mean, (logits + logits_dist) / 2)


def test_every_parameter_gets_a_gradient() -> None:
    model = create_model("deit_digits_patch4_16", num_classes=3, layer_scale=0.5)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("size", [384, 160])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_position_embeddings_are_resized_as_timm_does(size: int, prefix: int, timm) -> None:
    from timm.layers import resample_abs_pos_embed

    pos_embed = torch.randn(1, prefix + 196, 24, generator=torch.Generator().manual_seed(0))
    side = size // 16
    expected = resample_abs_pos_embed(pos_embed, [side, side], num_prefix_tokens=prefix)
    torch.testing.assert_close(resize_pos_embed(pos_embed, side**2, prefix), expected, rtol=0, atol=1e-6)


def test_drop_path_scales_keep_the_mean_and_rise_over_depth() -> None:
    model = create_model("deit_digits_patch4_16", drop_path=0.4)
    torch.manual_seed(0)
    path_scale = model.draw_path_scales(20_000, torch.device("cpu"))
    assert path_scale is not None
    assert path_scale.shape == (len(model.blocks), 2, 20_000)
    torch.testing.assert_close(path_scale.mean(-1), torch.ones(len(model.blocks), 2), rtol=0, atol=0.03)
    dropped = (path_scale == 0).float().mean((1, 2))
    torch.testing.assert_close(dropped, torch.linspace(0, 0.4, len(model.blocks)), rtol=0, atol=0.01)
    assert path_scales(torch.zeros(2, 2, 1), [0.0, 0.5]).flatten().tolist() == [1, 1, 0, 0]


def test_drop_path_leaves_a_dropped_image_as_it_was() -> None:
    model = create_model("deit_digits_patch4_16", drop_path=0.5).train()
    randomise(model)
    images = torch.randn(2, 3, 16, 16)
    path_scale = torch.ones(len(model.blocks), 2, 2)
    path_scale[:, :, 1] = 0
    tokens = model.forward_features(images, path_scale)
    torch.testing.assert_close(tokens[1], model.norm(model.embed(images))[1])
    torch.testing.assert_close(tokens[0], model.eval().forward_features(images)[0])


def test_real_weights_load_at_another_image_size(shared_data) -> None:
    weights = shared_data / "weights" / "deit_tiny_patch16_224.safetensors"
    model = create_model("deit_tiny_patch16_384", str(weights))
    assert model.pos_embed.shape == (1, 577, 192)
    assert create_model("deit_tiny_patch16_224", str(weights), image_size=256).image_size == 256


@pytest.fixture
def digits_weights(tmp_path):
    model = create_model("deit_digits_patch4_16", num_classes=4)
    path = tmp_path / "digits.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_weights_round_trip_through_files(digits_weights, tmp_path) -> None:
    model, path = digits_weights
    official = tmp_path / "official.pth"
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}}, official)
    for file in (path, official):
        loaded = create_model("deit_digits_patch4_16", str(file), num_classes=4)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_reset_head_starts_at_zero_and_keeps_the_rest(digits_weights) -> None:
    model, path = digits_weights
    loaded = create_model("deit_digits_patch4_16", str(path), num_classes=7, reset_head=True)
    assert loaded.head.weight.shape == (7, 128)
    assert not loaded.head.weight.any()
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert torch.equal(loaded.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)


class _Code:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "lacks tensor norm.weight"),
        (
            lambda s: s.update({"norm.weigth": s.pop("norm.weight")}),
            "lacks tensor norm.weight. Did you mean norm.weigth?",
        ),
        (lambda s: s.update(foo=torch.ones(1)), "has tensor foo, which the model lacks"),
        (lambda s: s.update({"norm.bias": torch.ones(3)}), r"norm.bias has shape \(3,\), the model's is \(128,\)"),
        (
            lambda s: s.update({"head.weight": torch.ones(9, 128)}),
            "the head has 9 classes, 4 are wanted. Add --reset-head",
        ),
        (lambda s: s.pop("patch_embed.proj.weight"), "of another model"),
    ],
)
def test_a_wrong_state_dict_is_named(digits_weights, change, message, tmp_path) -> None:
    model, _ = digits_weights
    state = model.state_dict()
    change(state)
    bad = tmp_path / "bad.safetensors"
    save_file(state, bad)
    with pytest.raises(DeitfastError, match=message):
        load_weights(model, bad, name="deit_digits_patch4_16")


def test_weights_of_another_variant_are_recognised(digits_weights) -> None:
    _, path = digits_weights
    with pytest.raises(DeitfastError, match="weights of deit_digits_patch4_16, not of deit_tiny_patch16_224"):
        create_model("deit_tiny_patch16_224", str(path))


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path, capsys) -> None:
    garbage, code = tmp_path / "x.safetensors", tmp_path / "code.pth"
    garbage.write_bytes(b"not a safetensors file")
    torch.save({"model": _Code()}, code)
    for path, message in [
        (garbage, "cannot be read as weights"),
        (code, "holds more than tensors"),
        (tmp_path / "y.safetensors", "no weight file .*Did you mean x.safetensors?"),
    ]:
        with pytest.raises(DeitfastError, match=message) as raised:
            create_model("deit_digits_patch4_16", str(path))
        assert "\n" not in str(raised.value)
    assert "code ran" not in capsys.readouterr().out


def test_wrong_names_and_sizes_are_refused() -> None:
    with pytest.raises(DeitfastError, match=r"'deit_smal' unknown. Did you mean deit_small_patch16_224?"):
        create_model("deit_smal")
    with pytest.raises(DeitfastError, match="image size 225 is no multiple of 16 px"):
        create_model("deit_tiny_patch16_224", image_size=225)
    model = create_model("deit_digits_patch4_16")
    with pytest.raises(ValueError, match="images are 28 x 28, the model takes 16 x 16"):
        model(torch.zeros(1, 3, 28, 28))


def test_fused_is_one_explicit_choice() -> None:
    from deitfast.model.fused import FusedBlock

    images = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    eager = create_model("deit_digits_patch4_16", num_classes=4, fused=False)
    torch.manual_seed(0)
    fused = create_model("deit_digits_patch4_16", num_classes=4, fused=True)
    assert not any(isinstance(block, FusedBlock) for block in eager.blocks)
    assert all(isinstance(block, FusedBlock) for block in fused.blocks)
    assert eager.state_dict().keys() == fused.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(fused(images), eager(images))
