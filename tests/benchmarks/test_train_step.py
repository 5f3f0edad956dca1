"""The training-step benchmark: every library computes the same step, and what does not is refused."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_train_step, breakdown
from benchmarks.bench_train_step import MODELS, job_of, plan, reusable
from benchmarks.measuring import peers_models, train_steps
from benchmarks.measuring.command import last_json, run_limited
from benchmarks.measuring.harness import Refused, Roofs
from benchmarks.measuring.record import facts
from benchmarks.measuring.train_steps import OWN, Job, TrainStep, attention_by, compare, reference
from tests.benchmarks.test_peers_ops import LayerNormLinear, LayerNormMLP, flash_attn_func, mlp_func, plant_modules

MODEL = "deit_digits_patch4_16"
JOB = Job("ours", MODEL, 6, "cpu", precision="fp32", quick=True)


@pytest.fixture(scope="module")
def expected():
    return reference(JOB)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fused": True},
        {"fused": True, "precision": "bf16"},
        {"library": "timm"},
        {"library": "timm", "precision": "bf16"},
        {"library": "torchvision"},
        {"library": "huggingface"},
    ],
    ids=str,
)
def test_every_library_takes_the_same_first_step(change, expected):
    job = replace(JOB, **change)
    compare(TrainStep(job).first(), expected, job.precision)


class TransformerLayer(torch.nn.Module):
    """TransformerEngine's, as far as it is asked for here, in PyTorch."""

    def __init__(
        self, hidden_size, ffn_hidden_size, num_attention_heads, *, layernorm_epsilon=1e-5, hidden_dropout=0.1,
        attention_dropout=0.1, self_attn_mask_type="causal", fuse_qkv_params=False, qkv_weight_interleaved=True,
        attn_input_format="sbhd", params_dtype=None, device="cuda",
    ):  # fmt: skip
        super().__init__()
        assert (hidden_dropout, attention_dropout, self_attn_mask_type) == (0, 0, "no_mask")
        assert (fuse_qkv_params, qkv_weight_interleaved, attn_input_format) == (True, False, "bshd")
        self.heads, own = num_attention_heads, (layernorm_epsilon, True, params_dtype, device)
        self.self_attention = torch.nn.Module()
        self.self_attention.layernorm_qkv = LayerNormLinear(hidden_size, 3 * hidden_size, *own)
        self.self_attention.proj = torch.nn.Linear(hidden_size, hidden_size)
        self.layernorm_mlp = LayerNormMLP(hidden_size, ffn_hidden_size, *own)
        self.register_parameter("layer_norm", None)

    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        pass

    def forward(self, hidden_states, attention_mask=None, self_attn_mask_type=None):
        assert attention_mask is self_attn_mask_type is None
        qkv = self.self_attention.layernorm_qkv(hidden_states).unflatten(-1, (3, self.heads, -1))
        out, _ = flash_attn_func(*qkv.unbind(-3))
        x = hidden_states + self.self_attention.proj(out.flatten(-2))
        return x + self.layernorm_mlp(x)


@pytest.fixture
def entered(monkeypatch) -> list[bool]:
    """Other libraries' parts, rehearsed; how often FP8 was asked for."""
    asked: list[bool] = []

    @contextlib.contextmanager
    def autocast(enabled):
        asked.append(enabled)
        yield

    plant_modules(monkeypatch, {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"TransformerLayer": TransformerLayer, "autocast": autocast},
        "quack": {}, "quack.mlp": {"mlp_func": mlp_func},
        "flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash_attn_func},
    })  # fmt: skip
    return asked


@pytest.mark.parametrize("way", ["transformer engine", "transformer engine, fp8", "quack MLP, flash-attn 4"])
def test_other_libraries_parts_take_the_same_first_step(way, expected, entered):
    peer = bench_train_step.PEERS[way]
    job = replace(JOB, library=peer.library, attention=peer.attention, precision=peer.precision or "bf16")
    with attention_by(job.attention):
        compare(TrainStep(job).first(), expected, "bf16")  # of a rehearsed FP8 too
    assert bool(entered) == (job.precision == "fp8")
    with pytest.raises(ImportError, match="needs a GPU"):
        train_steps.work(job, expected)


def test_flash_attention_stands_in_for_sdpa(entered):
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    calls, flash = [], sys.modules["flash_attn.cute"]
    flash.flash_attn_func = lambda *qkv: calls.append([x.shape for x in qkv]) or (qkv[0], None)
    with attention_by("flash-attn 4"):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
    assert torch.equal(out, q)
    assert calls == [[(2, 5, 2, 8)] * 3]
    with attention_by(OWN):
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v), expected)


def test_the_reference_does_not_depend_on_its_chunks(expected):
    whole = reference(JOB, chunk=2)
    assert whole.loss == pytest.approx(expected.loss, rel=1e-6)
    assert whole.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", ["keys and queries swapped", "norm eps", "half the loss"])
def test_another_function_is_refused(wrong, precision, expected):
    step = TrainStep(replace(JOB, precision=precision))
    with torch.no_grad():
        for block in step.model.blocks:
            if wrong == "keys and queries swapped":
                q, k, v = block.attn.qkv.weight.clone().chunk(3)
                block.attn.qkv.weight.copy_(torch.cat([k, q, v]))
            elif wrong == "norm eps":
                block.norm1.eps = 0.5
    if wrong == "half the loss":
        backward = step.backward
        step.backward = lambda loss: backward(loss / 2)
    with pytest.raises(Refused, match="relative to eager fp32"):
        compare(step.first(), expected, precision)


def test_a_refused_way_gets_no_time(monkeypatch, expected):
    monkeypatch.setattr(train_steps, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(Refused):
        train_steps.work(JOB, replace(expected, loss=2 * expected.loss))


def test_absence_and_lack_of_memory_are_rows(monkeypatch):
    for problem, row in (
        (ImportError("No module named 'timm'"), {"absent": "timm: No module named 'timm'"}),
        (torch.OutOfMemoryError("CUDA out of memory"), {"failed": "out of memory"}),
    ):

        def fail(*_, problem=problem):
            raise problem

        monkeypatch.setattr(bench_train_step, "work", fail)
        assert bench_train_step._attempt(replace(JOB, library="timm"), None) == row


def test_names_of_older_transformers_are_known():
    assert peers_models.timm_name("vit.encoder.layer.3.attention.attention.key.bias", "huggingface") == (
        "blocks.3.attn.k.bias"
    )
    assert peers_models.timm_name("vit.encoder.layer.3.attention.output.dense.bias", "huggingface") == (
        "blocks.3.attn.proj.bias"
    )
    assert peers_models.timm_name("vit.encoder.layer.3.output.dense.weight", "huggingface") == "blocks.3.mlp.fc2.weight"


def test_the_plan_starts_with_what_matters_most():
    order = list(plan(MODELS, None, "cuda"))
    assert order[:3] == [("deit_base", "ours"), ("deit_base", "timm + compile"), ("deit_base", "timm")]
    assert len(order) == len(set(order))
    assert [model for model, way in order if way == "torchvision"] == ["deit_base"]
    assert {way for _, way in order} == set(bench_train_step.ways("cuda"))
    assert list(plan(["deit_tiny"], ["timm", "ours"], "cpu")) == [("deit_tiny", "ours"), ("deit_tiny", "timm")]


def test_every_switch_changes_the_job():
    for device in ("cuda", "cpu"):
        base = job_of("ours", "deit_tiny", 8, device, False)
        jobs = [job_of(way, "deit_tiny", 8, device, False) for way in bench_train_step.switches(device)]
        assert len({base, *jobs}) == len(jobs) + 1


def test_rates_follow_from_the_time():
    row = bench_train_step.derived({"ms": 100.0}, "deit_base", 400, "NVIDIA H100 80GB HBM3", Roofs(800.0, 3000.0))
    assert row["images_per_second"] == pytest.approx(4000)
    assert row["mfu_roof_percent"] == pytest.approx(100 * 4000 * 105.38e9 / 800e12, rel=1e-3)
    assert row["mfu_datasheet_percent"] == pytest.approx(row["mfu_roof_percent"] * 800 / 989.4)
    assert row["hours_300_epochs"] == pytest.approx(300 * 1281167 / 4000 / 3600)
    assert bench_train_step.derived({"ms": 1.0}, "deit_base", 1, None, None)["mfu_roof_percent"] is None


def test_rows_are_reused_only_where_they_still_hold(tmp_path):
    here = facts("cpu")
    timm = {"key": {"way": "timm"}, "ms": 1.0, "version": peers_models.version("timm")}
    ours = {"key": {"way": "ours"}, "ms": 1.0, "sources": here["sources"]}
    old = [{"key": {"way": "timm + compile"}, "ms": 1.0, "version": "0.0"}, {"key": {"way": "ours, fp32"}, "ms": 1.0}]
    data = {"theme": "train_step", "quick": False, "facts": here}
    data["rows"] = [timm, ours, *old, {"key": {"way": "huggingface"}, "failed": "out of memory"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    assert list(reusable([path], here, False).values()) == [timm | {"reused": True}, ours | {"reused": True}]
    assert not reusable([path], here, True)
    assert not reusable([path], here | {"torch": "1.0"}, False)


def test_mistakes_are_told_in_one_line(capsys):
    for arguments, words in (
        (["--models", "deit_tniy"], "model 'deit_tniy' unknown. Did you mean deit_tiny"),
        (["--ways", "theirs"], "way 'theirs' unknown; choose from ours,"),
        (["--batch", "0"], "--batch 0 is not positive"),
    ):
        assert bench_train_step.main(["--device", "cpu", "--quick", *arguments]) == 2
        assert words in capsys.readouterr().err


# Processes -----------------------------------------------------------------------------------------------------------


def test_a_hanging_process_is_killed_with_its_children_and_what_it_printed_is_kept():
    child = "import time; time.sleep(600)"
    parent = f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    parent += "print(child.pid, flush=True); time.sleep(600)"
    seen = []
    finished = run_limited([sys.executable, "-c", parent], 4, seen.append)
    assert finished.status is None
    assert "took longer than" in finished.problem
    assert seen[-1] == finished.out
    stat = Path(f"/proc/{int(finished.out)}/stat")
    # It dies when it is scheduled next, and is a zombie until somebody waits for it.
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(0.05)


def test_a_crash_is_told_with_its_last_line():
    finished = run_limited([sys.executable, "-c", "raise ValueError('no such shape')"], 20)
    assert finished.problem == "exit status 1: ValueError: no such shape"
    assert last_json("noise\n{}") == {}
    assert last_json("noise\n") is None


# Breakdown -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "phase", "part"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "forward", "GEMM forward"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "backward", "GEMM backward"),
        ("linear_kernel", "backward", "GEMM backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "forward", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "backward", "attention"),
        ("attention_bwd_dkdv_kernel", "backward", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc", "forward", "input, heads, loss"),
        ("triton_per_fused_native_layer_norm_convolution_3", "forward", "norm, elementwise"),
        ("layernorm_bwd_kernel", "backward", "norm, elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor>", "forward", "norm, elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "update", "optimiser"),
        ("aten::addmm", "forward", "GEMM forward"),
        ("something_new", "forward", "other"),
    ],
)
def test_kernels_are_counted_where_they_belong(kernel, phase, part):
    assert breakdown.part_of(kernel, phase) == part


def test_overlapping_kernels_count_once():
    assert breakdown.busy([("a", 0, 10), ("b", 5, 12), ("c", 20, 21), ("d", 6, 7)]) == 13


def test_every_part_of_a_step_is_seen(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--quick", "--model", MODEL, "--batch", "6", "--out", str(path)]
    assert breakdown.main(arguments) == 0
    rows = {row["key"]["part"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {*breakdown.PARTS, "step"}
    for part in ("GEMM forward", "GEMM backward", "attention", "norm, elementwise", "optimiser"):
        assert rows[part]["us_image"] > 0
        assert rows[part]["kernels"]
    assert rows["step"]["us_image"] > 0


def test_the_parts_of_a_step_add_up(monkeypatch):
    """A step of 20 us whose kernels leave 3 us between them; each phase is profiled by itself."""
    forward, backward = [("linear_kernel", 0, 4), ("attention_fwd_kernel", 4, 6)], [("linear_kernel", 0, 9)]
    runs = iter([
        ([*forward, ("linear_kernel", 7, 16), ("adamw", 18, 20)], 20.0),
        (forward, 6.0), (backward, 9.0), ([("adamw", 0, 2)], 2.0),
    ])  # fmt: skip
    monkeypatch.setattr(breakdown, "traced", lambda call, device: (call(), next(runs))[1])

    class Step:
        def __call__(self):
            pass

        update = __call__

        def forward(self):
            return ["loss"]

        def backward(self, loss):
            assert loss == "loss"

    parts, kernels, elapsed = breakdown.profile_step(Step(), "cuda")
    expected = {"GEMM forward": 4, "attention": 2, "GEMM backward": 9, "optimiser": 2, "gaps": 3}
    assert {part: us for part, us in parts.items() if us} == expected
    assert sum(parts.values()) == elapsed == 20
    assert kernels["GEMM backward"] == {"linear_kernel": 9}


def test_only_what_exceeds_its_budget_is_marked():
    row = {"key": {"part": "attention"}, "us_image": 30.0, "floor_us": 16.0, "budget_us": 22.0, "kernels": []}
    text = breakdown.table([row | {"over": True}, row | {"over": False, "budget_us": None}])
    assert text.count("OVER") == 1
