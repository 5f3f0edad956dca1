"""`fuse` and `create_model(fused=...)`: the same model, by another way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from deitfast.kernels.common import INTERPRETED
from deitfast.model.deit import Block, DeiT, Subset, prefix_alone
from deitfast.model.fused import FusedBlock, fuse, saved_bytes_of_keys_and_values, saved_bytes_per_token
from tests.kernels.tolerance import assert_close_to_float64
from tests.vit_peers import images, outputs_and_gradients, perturb


def small_deit(**kwargs) -> DeiT:
    sizes = {"width": 64, "depth": 2, "num_heads": 2, "image_size": 24, "patch_size": 8, "num_classes": 5}
    torch.manual_seed(0)
    return perturb(DeiT(**(sizes | kwargs)))


@pytest.mark.parametrize("options", [{}, {"distilled": True, "drop_path": 0.5}, {"layer_scale": 0.1}])
@pytest.mark.parametrize("training", [False, True])
def test_a_fused_model_is_as_near_to_float64_as_eager(options, training):
    eager = small_deit(**options).train(training)
    exact = copy.deepcopy(eager).double()
    fused = fuse(copy.deepcopy(eager))
    assert list(fused.state_dict()) == list(eager.state_dict())
    x = images(eager, batch=3)
    path_scale = eager.draw_path_scales(3, x.device) if training else None
    found = []
    for model in (exact, eager, fused):
        model.prefix_features = lambda x, _=None, model=model: type(model).prefix_features(model, x, path_scale)
        found.append(outputs_and_gradients(model, x.to(next(model.parameters()).dtype)))
    for name in found[1]:
        factor = 2.0 if name == "logits" else 3.0
        assert_close_to_float64(name, found[2][name], found[0][name], found[1][name], factor)


DROPS = {
    "none": None,
    "each image": torch.tensor([[1.25, 0.0, 1.25, 0.0], [0.0, 1.25, 1.25, 0.0]]),
    "subset": Subset(torch.tensor([[0, 2, 3], [1, 2, 3]]), 4 / 3),
}


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_block_for_the_prefix_alone_has_the_rows_and_gradients_of_the_whole_block(drop, layer_scale, prefix, fused):
    model = small_deit(layer_scale=layer_scale)
    exact = copy.deepcopy(model.blocks[0]).double()
    whole, part = (copy.deepcopy(model if not fused else fuse(model)).blocks[0] for _ in range(2))
    x = torch.randn(4, 10, 64)
    dout = torch.randn(4, prefix, 64)
    found = []
    for block, dtype, rows in (
        (exact, torch.float64, None),
        (whole, torch.float32, None),
        (part, torch.float32, prefix),
    ):
        given = x.to(dtype).requires_grad_()
        out = block(given, DROPS[drop], rows)[:, :prefix]
        out.backward(dout.to(dtype))
        gradients = {name: p.grad for name, p in block.named_parameters()}
        found.append({"out": out.detach(), "x": given.grad} | gradients)
    for name in found[1]:
        assert_close_to_float64(name, found[2][name], found[0][name], found[1][name], 2.0 if name == "out" else 3.0)


def test_in_16_bits_the_scores_of_the_prefix_are_not_rounded():
    """Of up to 180, which bf16 keeps to a half: the prefix alone is as near to float64 as the whole."""
    block = small_deit().blocks[0].bfloat16()
    block.attn.qkv.weight.data *= 12
    exact = copy.deepcopy(block).double()
    x = torch.randn(4, 50, 64).bfloat16()
    part, whole = block(x, None, 1), block(x)[:, :1]
    assert_close_to_float64("out", part, exact(x.double())[:, :1], whole, 1.2)


def test_no_head_reads_more_than_the_prefix():
    """The last block's queries, projection and MLP see one row an image (two with a distillation token)."""
    for fused in (False, True):
        model = small_deit(distilled=True)
        seen: list[tuple[int, ...]] = []
        model = fuse(model) if fused else model
        model.norm.register_forward_hook(lambda module, given, out, seen=seen: seen.append(tuple(out.shape)))
        logits = model.eval()(images(model, batch=3))
        assert seen == [(3, 2, 64)]
        tokens = model.forward_features(images(model, batch=3))
        both = model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])
        torch.testing.assert_close(logits, both / 2, rtol=1e-5, atol=1e-5)


def _hook(block):
    block.mlp.register_forward_hook(lambda module, given, out: None)


def _adapter(block):
    block.attn.qkv = torch.nn.Sequential(block.attn.qkv)


def _other_mlp(block):
    block.mlp = torch.nn.Sequential(block.mlp)


def _patched(block):
    block.attn.forward = block.attn.forward


def _parametrised(block):
    torch.nn.utils.parametrizations.weight_norm(block.mlp.fc1)


@pytest.mark.parametrize("change", [_hook, _adapter, _other_mlp, _patched, _parametrised])
def test_a_last_block_that_is_watched_or_changed_computes_all_tokens(change):
    model = small_deit().eval()
    expected, rows = model(images(model)), []
    change(model.blocks[-1])
    model.blocks[-1].norm2.register_forward_hook(lambda module, given, out: rows.append(out.shape[1]))
    torch.testing.assert_close(model(images(model)), expected, rtol=1e-5, atol=1e-5)
    assert rows == [10]
    assert not prefix_alone(model.blocks[-1])


def test_fuse_keeps_parameters_and_survives_copies():
    model = small_deit()
    parameters = list(model.parameters())
    assert fuse(model) is model
    assert all(type(block) is FusedBlock for block in model.blocks)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    x = images(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(block) is FusedBlock for block in twin.blocks)
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.1, "distilled": True}], ids=str)
@pytest.mark.parametrize("form", ["none", "each image", "subset"])
@pytest.mark.parametrize("fused", [False, True])
def test_recomputing_changes_no_bit_of_loss_and_gradients(options, form, fused):
    kept = small_deit(**options)
    kept = fuse(kept) if fused else kept
    again, x, drop = copy.deepcopy(kept), images(kept, batch=4), DROPS[form]
    for block in again.blocks:
        block.recompute = True
    found = []
    for model in (kept, again):
        logits = model(x, None if drop is None else torch.stack([drop] * 2) if form != "subset" else [drop] * 2)
        (sum(logits) if isinstance(logits, tuple) else logits).logsumexp(1).sum().backward()
        found.append({"logits": logits} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("width", "heads", "mlp_ratio", "dtype"),
    [(128, 2, 4.0, torch.float32), (96, 3, 2.0, torch.float32), (128, 2, 4.0, torch.bfloat16)],
)
@pytest.mark.skipif(INTERPRETED, reason="what is saved does not depend on who computes it")
def test_saved_bytes_per_token_are_what_autograd_saves(width, heads, mlp_ratio, dtype, recompute):
    """Two blocks with LayerScale, counted once for each memory they save; parameters are not counted."""
    blocks = [FusedBlock(width, heads, mlp_ratio, 0.1).to(dtype) for _ in range(2)]
    for block in blocks:
        block.recompute = recompute
    parameters = {p.data_ptr() for block in blocks for p in block.parameters()}
    batch, tokens = 3, 10
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = blocks[1](blocks[0](x))
    expected = saved_bytes_per_token(width, int(width * mlp_ratio), dtype.itemsize, width // heads, recompute)
    assert sum(saved.values()) == 2 * batch * tokens * expected
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subset_out = blocks[0](x, Subset(torch.tensor([[0, 2], [1, 2]]), 1.5))
    stream, index = 2 * width * dtype.itemsize, 2 * 2 * 8  # x of both halves, whole; the samples' indices
    assert sum(saved.values()) == tokens * (batch * stream + 2 * (expected - stream)) + index
    assert out.grad_fn is not None
    assert subset_out.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(INTERPRETED, reason="what is saved does not depend on who computes it")
def test_a_block_for_the_prefix_saves_of_the_other_tokens_what_keys_and_values_need(dtype):
    """Counted at two lengths, so that what the prefix itself saves falls out of the difference."""
    width, batch, block = 128, 3, FusedBlock(128, 2, 4.0, None).to(dtype)
    parameters, found = {p.data_ptr() for p in block.parameters()}, []
    for tokens in (10, 30):
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        x = torch.randn(batch, tokens, width, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x, prefix=1)
        found.append(sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in parameters))
    assert found[1] - found[0] == batch * 20 * saved_bytes_of_keys_and_values(width, dtype.itemsize)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs kernels on CPU tensors")
def test_fused_on_gpu_only_leaves_cpu_in_eager_pytorch():
    eager = small_deit()
    fused = fuse(copy.deepcopy(eager), on_cpu=False)
    assert torch.equal(fused(images(eager)), eager(images(eager)))
    assert isinstance(fused.blocks[0], Block)


def test_torch_compile_takes_the_whole_fused_model():
    model = fuse(small_deit()).eval()
    x = images(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, actual = outputs_and_gradients(model, x), outputs_and_gradients(compiled, x)
    for name in expected:
        torch.testing.assert_close(actual.get(name, actual.get(f"_orig_mod.{name}")), expected[name])


def test_a_head_dimension_without_a_kernel_is_named():
    with pytest.raises(ValueError, match="head dimensions are 32"):
        fuse(small_deit(num_heads=4))(torch.zeros(1, 3, 24, 24))


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"class_position": False}])
@pytest.mark.parametrize("fused", [False, True])
def test_patches_give_what_images_give(options, fused):
    eager = small_deit(**options)
    exact, model = copy.deepcopy(eager).double(), fuse(copy.deepcopy(eager)) if fused else eager
    x = images(eager, batch=3)
    patches = F.unfold(x, eager.patch_size, stride=eager.patch_size).transpose(1, 2).contiguous()
    found = []
    for network, given in ((exact, x.double()), (eager, x), (model, patches)):
        network.zero_grad()
        logits = network(given)
        (sum(logits) if isinstance(logits, tuple) else logits).square().sum().backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    for name in found[0]:
        assert_close_to_float64(name, found[2][name], found[0][name], found[1][name], 3.0)
