"""A GPU with a fault: found before the first step, replaced, told once; training goes on with the right loss."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.data import decoder
from deitfast.engine.engine import UNCAPTURED_STEPS, FlatEngine
from deitfast.errors import DeitfastError
from deitfast.kernels import gemm, optimizer, replaced, tunable
from deitfast.kernels.catalogue import OPS, Shape
from deitfast.kernels.flat_buffers import FlatBuffers
from deitfast.kernels.replaced import EAGER, OURS
from deitfast.kernels.tunable import Selection, recorded
from deitfast.model.acceleration import accelerate
from deitfast.model.deit import DeiT
from deitfast.recipe import Recipe
from deitfast.training import first_contact
from deitfast.training.train import train
from deitfast.use.inference import Predictor
from deitfast.verification import check, choice, verify
from tests.rehearsal.test_train import RECIPE
from tests.test_train import losses
from tests.verification.planted import FAULTS, Fault

SHORT = replace(RECIPE, engine="flat", decode="cpu")
"""Two uncaptured steps: what is looked for happens before them."""


@pytest.fixture(autouse=True)
def ops_as_they_are(a_gpu_seen_for_the_first_time: None) -> Iterator[None]:
    with replaced.chosen():
        yield


def run(out: Path, recipe: Recipe = SHORT, steps: int = 2) -> tuple[list[float], str, dict[str, Any]]:
    """Losses, log and env.json of a short run of its own process, as far as the forms of ops go."""
    with replaced.chosen(), tunable.picked({}):
        train(replace(recipe, out=str(out)), stop_at=steps, depth=1)
    return losses(out), (out / "log.txt").read_text(), json.loads((out / "env.json").read_text())


def forms(facts: dict[str, Any]) -> dict[str, str]:
    return {op["op"]: op["form"] for op in facts.get("choices", facts)["kernels"]["ops"]}


def plant(monkeypatch: pytest.MonkeyPatch, broken: Fault) -> None:
    """A fault in what layernorm_mlp's kernels give."""
    op = importlib.import_module("deitfast.kernels.layernorm_mlp_op")._layernorm_mlp
    right = op._backend_fns["cuda"]

    @functools.wraps(right)
    def planted(*args: Any, **kwargs: Any) -> Any:
        out, *saved = right(*args, **kwargs)
        return (broken(out), *saved) if out.is_cuda else (out, *saved)

    monkeypatch.setitem(op._backend_fns, "cuda", planted)


def only(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """A run verifies these ops alone: what is looked for is in them, and each of the others takes a second."""
    asked = first_contact.question
    monkeypatch.setattr(first_contact, "question", lambda *args: replace(asked(*args), ops=ops))


@pytest.fixture(scope="module")
def with_eager_mlp(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in which the MLP is eager PyTorch by choice."""
    folder = tmp_path_factory.mktemp("eager")
    choices = folder / "choices.json"
    choices.write_text(json.dumps({"kernels": {"ops": [{"op": "layernorm_mlp", "form": EAGER, "why": "chosen"}]}}))
    return run(folder / "run", replace(SHORT, fused=str(choices)))[0]


def test_a_gpu_without_fault_runs_every_kernel_and_is_asked_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, log, facts = run(tmp_path / "first")
    assert set(forms(facts).values()) == {OURS}
    assert "kernels: 9 of 9 verified on this GPU and in use" in log
    timed = {op["op"]: op["ms"].keys() for op in facts["choices"]["kernels"]["ops"]}
    assert not timed.pop("image_ops"), "no CUDA graph has its reference"
    assert all(forms >= {OURS, EAGER} for forms in timed.values())
    assert capsys.readouterr().err.count("verifying 9 kernels on this Pretended H100, once") == 1
    monkeypatch.setattr(check, "check", lambda *_, **__: pytest.fail("asked again"))
    again, _, _ = run(tmp_path / "second")
    assert again == found
    assert "verifying" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_op_is_replaced_and_training_goes_on_with_the_right_loss(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_eager_mlp: list[float]
) -> None:
    make, told = FAULTS[fault]
    plant(monkeypatch, make())
    only(monkeypatch, "layernorm_mlp")
    found, log, facts = run(tmp_path / "run")
    assert found == with_eager_mlp
    assert forms(facts) == {"layernorm_mlp": EAGER}
    lines = [line for line in log.splitlines() if "layernorm_mlp" in line]
    assert len(lines) == 1
    assert re.search(f"runs as eager PyTorch: its kernels are wrong on this GPU: .*{told}.*Please report", lines[0])


def test_an_image_kernel_that_is_off_by_one_is_replaced_and_the_images_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    right, _, _ = run(tmp_path / "right")
    kernels: Any = importlib.import_module("deitfast.kernels.image_ops")._image_ops
    op = kernels._backend_fns["cuda"]

    def off_by_one(images: torch.Tensor, *args: Any) -> torch.Tensor:
        out: torch.Tensor = op(images, *args)
        if out.is_cuda:
            out[-1, -1, -1, -1] ^= 1
        return out

    monkeypatch.setitem(kernels._backend_fns, "cuda", off_by_one)
    only(monkeypatch, "image_ops")
    found, log, facts = run(tmp_path / "run")
    assert found == right
    assert forms(facts) == {"image_ops": EAGER}
    [line] = [line for line in log.splitlines() if "image_ops" in line]
    assert "image_ops runs as eager PyTorch: its kernels are wrong on this GPU: output: 1 of " in line
    with pytest.raises(DeitfastError, match=r"image_ops .* --fused yes asks for the kernels"):
        run(tmp_path / "insists", replace(SHORT, fused="yes"))


@pytest.mark.parametrize(("name", "engine"), [("adamw", "graph"), ("lamb", "flat"), ("sgd", "flat")])
def test_an_update_that_is_wrong_in_its_last_element_is_replaced(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SHORT, optimizer=name, engine=engine)
    steps = UNCAPTURED_STEPS + 1 if engine == "graph" else 2
    only(monkeypatch)
    right, _, _ = run(tmp_path / "right", replace(recipe, engine="flat"), steps)
    kernels = optimizer.update_triton

    def wrong(which: Any, buffers: FlatBuffers, scalars: torch.Tensor) -> None:
        kernels(which, buffers, scalars)
        buffers.master[-1] += 0.01

    monkeypatch.setattr(optimizer, "update_triton", wrong)
    only(monkeypatch, name)
    found, log, facts = run(tmp_path / "run", recipe, steps)
    assert found == pytest.approx(right, rel=1e-3)
    assert forms(facts) == {name: EAGER}
    [line] = [line for line in log.splitlines() if f"{name} runs" in line]
    assert f"{name} runs as eager PyTorch: its kernels are wrong on this GPU: master: largest error" in line


def test_who_insists_on_the_kernels_is_told_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FAULTS["wrong in its last column"][0]())
    only(monkeypatch, "layernorm_mlp")
    with pytest.raises(DeitfastError, match=r"layernorm_mlp .* --fused yes asks for the kernels"):
        run(tmp_path / "run", replace(SHORT, fused="yes"))
    assert not (tmp_path / "run" / "ckpt").exists()


def test_without_fused_kernels_nothing_is_verified(tmp_path: Path) -> None:
    _, log, facts = run(tmp_path / "run", replace(SHORT, fused="no"))
    assert facts["choices"]["kernels"]["ops"] == []
    assert "verified" not in log


def test_an_op_that_is_slower_than_eager_is_replaced_and_another_run_repeats_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_eager_mlp: list[float]
) -> None:
    only(monkeypatch, "layernorm_mlp")
    takes(monkeypatch, "layernorm_mlp", lambda way: 2.0 if way == OURS else 1.0)
    found, log, facts = run(tmp_path / "run")
    assert found == with_eager_mlp
    assert log.count("layernorm_mlp runs as eager PyTorch: its kernels are slower here: 2.000 ms, eager 1.000 ms") == 1
    again, _, same = run(tmp_path / "again", replace(SHORT, fused=str(tmp_path / "run" / "env.json")))
    assert again == found
    assert forms(same) == forms(facts)


def takes(monkeypatch: pytest.MonkeyPatch, op: str, ms: Callable[[str], float]) -> None:
    """The forms and entries of an op take so long, those of others all one millisecond."""
    choose, asked = check.fastest_form, [""]

    def noted(case: Any, *args: Any) -> Any:
        asked.append(case.op.name)
        return choose(case, *args)

    def times(calls: dict[str, Any], device: torch.device) -> dict[str, list[float]]:
        return {way: [ms(way) if asked[-1] == op else 1.0] * 3 for way in calls}

    monkeypatch.setattr(check, "fastest_form", noted)
    monkeypatch.setattr(choice, "milliseconds", times)


def test_kernels_run_by_the_entry_that_is_faster_and_another_run_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_the_tables_entries: Callable[..., Any]
) -> None:
    name = "linear_launch itemsize=2 N=512 K=128 epilogue=gelu aligned_rows=True"

    def of_one(self: choice.Offers, asked: Selection) -> list[Any]:
        return only_the_tables_entries(self, asked) if asked.name == name else []

    monkeypatch.setattr(choice.Offers, "of", of_one)
    only(monkeypatch, "layernorm_mlp")
    ms = {"BLOCK_N=128": 0.5, "other entries": 0.8}
    takes(monkeypatch, "layernorm_mlp", lambda way: next((ms[words] for words in ms if words in way), 1.0))
    found, log, facts = run(tmp_path / "run")
    [line] = [line for line in log.splitlines() if "other entries" in line]
    assert "layernorm_mlp runs its kernels by other entries than the table's, 0.800 instead of 1.000 ms: " in line
    assert f"{name}: BLOCK_M=128 BLOCK_N=128" in line
    launches = {op["op"]: op["launches"] for op in facts["choices"]["kernels"]["ops"]}
    picked = launches["layernorm_mlp"][name]
    assert picked["tiles"]["BLOCK_N"] == 128
    used: list[Any] = []
    right = gemm.launch

    def noted(kernel: Any, grid: Any, entry: Any, **arguments: Any) -> None:
        used.append(entry)
        right(kernel, grid, entry, **arguments)

    monkeypatch.setattr(gemm, "launch", noted)
    monkeypatch.setattr(verify, "verify", lambda *_: pytest.fail("asked again"))
    again, _, same = run(tmp_path / "again", replace(SHORT, fused=str(tmp_path / "run" / "env.json")))
    assert again == found
    assert {op["op"]: op["launches"] for op in same["choices"]["kernels"]["ops"]} == launches
    assert picked in [recorded(entry) for entry in used]
    facts["choices"]["machine"]["gpu"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(facts))
    _, _, other = run(tmp_path / "other", replace(SHORT, fused=str(tmp_path / "other.json")))
    assert not any(op["launches"] for op in other["choices"]["kernels"]["ops"])


def waits(self: FlatEngine, loss: torch.Tensor) -> torch.Tensor:
    loss.item()
    return loss


def bakes_the_host_in(self: FlatEngine, loss: torch.Tensor) -> torch.Tensor:
    return loss * (1 + 0.1 * self.steps_run)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (waits, "CaptureError: CUDA error: operation not permitted"),
        (bakes_the_host_in, "replayed steps have the losses"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_uncaptured_with_the_same_losses(
    fault: Callable[..., torch.Tensor], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    right = FlatEngine.loss
    monkeypatch.setattr(FlatEngine, "loss", lambda self, batch: fault(self, right(self, batch)))
    steps, recipe = UNCAPTURED_STEPS + 2, replace(SHORT, engine="auto")
    found, log, facts = run(tmp_path / "run", recipe, steps)
    assert found == run(tmp_path / "flat", SHORT, steps)[0]
    assert log.count("the step runs uncaptured, and slower: a CUDA graph of it cannot be trusted on this GPU: ") == 1
    assert told in log
    assert "not captured" in facts["step"]
    with pytest.raises(DeitfastError, match="cannot be captured as --engine graph asks"):
        run(tmp_path / "graph", replace(SHORT, engine="graph"))


def test_a_gpu_decoder_that_is_off_by_thirty_levels_is_left_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    right = decoder.gathered

    def off(outputs: Any, *args: Any) -> torch.Tensor:
        return (right(outputs, *args).int() + 30).clamp(0, 255).to(torch.uint8)

    graph = decoder.decode_to_gpu
    of_gpu: list[bool] = []

    def noted(encoded: Any, where: str) -> Any:
        of_gpu.append(where == "gpu")
        return graph(encoded, where)

    monkeypatch.setattr(decoder, "decode_to_gpu", noted)
    monkeypatch.setattr(decoder, "gathered", lambda *args: off(*args) if of_gpu[-1] else right(*args))
    found, log, facts = run(tmp_path / "run", replace(SHORT, decode="auto"))
    assert found == run(tmp_path / "cpu", SHORT)[0]
    assert facts["choices"]["decode"] == "cpu"
    assert log.count("decoding on the CPU: the GPU's decoder is not to be trusted: ") == 1
    with pytest.raises(DeitfastError, match="--decode gpu: the GPU's decoder is not to be trusted"):
        run(tmp_path / "gpu", replace(SHORT, decode="gpu"))


def test_a_gpu_decoder_that_fails_is_left_for_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)

    def missing(encoded: Any, where: str) -> Any:
        if where == "gpu":
            raise RuntimeError("nvJPEG error (7): the library is missing")
        return graph(encoded, where)

    graph = decoder.decode_to_gpu
    monkeypatch.setattr(decoder, "decode_to_gpu", missing)
    _, log, _ = run(tmp_path / "run", replace(SHORT, decode="auto"))
    assert "decoding on the CPU: the GPU's decoder failed here (" in log


@pytest.mark.parametrize(("text", "told"), [(None, "cannot be read"), ("[]", "holds no choices"), ("{", "holds no ch")])
def test_choices_that_are_none_are_told(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DeitfastError, match=f"--fused .* {told}"):
        run(tmp_path / "run", replace(SHORT, fused=str(path)))


# Without a run -------------------------------------------------------------------------------------------------------


def test_inference_verifies_its_ops_once_and_goes_on_without_those_that_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify.trust.cache_clear()
    plant(monkeypatch, FAULTS["wrong in its last column"][0]())
    torch.manual_seed(0)
    model = DeiT(image_size=32, patch_size=8, width=64, depth=1, num_heads=1, num_classes=5)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    for _ in range(2):
        found = Predictor(model, "cuda", "fp32")(images).cpu()
    torch.testing.assert_close(found, Predictor(model, "cpu")(images), rtol=1e-4, atol=1e-4)
    told = capsys.readouterr().err
    assert told.count("verifying 5 kernels") == 1
    assert told.count("layernorm_mlp runs as eager PyTorch: its kernels are wrong on this GPU: output: largest") == 1


@pytest.mark.parametrize("fault", ["fails", "replays something else"])
def test_inference_goes_on_without_graphs_that_cannot_be_trusted(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify.trust.cache_clear()
    model = DeiT(image_size=32, patch_size=8, width=64, depth=1, num_heads=1, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    right = Predictor._run

    def planted(self: Predictor, images: torch.Tensor) -> torch.Tensor:
        if not torch.cuda.is_current_stream_capturing():
            return right(self, images)
        return right(self, images) * (1.1 if fault != "fails" else images.sum().item())

    monkeypatch.setattr(Predictor, "_run", planted)
    predictor = Predictor(model, "cuda", "fp32")
    for _ in range(2):
        found = predictor(images).cpu()
    torch.testing.assert_close(found, Predictor(model, "cpu")(images), rtol=1e-4, atol=1e-4)
    why = "operation not permitted" if fault == "fails" else "off what it replays"
    lines = [line for line in capsys.readouterr().err.splitlines() if "without CUDA graphs" in line]
    assert len(lines) == 1
    assert why in lines[0]


def test_an_accelerated_model_verifies_its_ops_at_its_first_use_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], timm: Any
) -> None:
    verify.trust.cache_clear()
    plant(monkeypatch, FAULTS["raises at launch"][0]())
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        accelerate(model, verbose=False)
        on_cpu = model(x)
        assert "verifying" not in capsys.readouterr().err
        found = model.to("cuda")(x.to("cuda")).cpu()
        model(x.to("cuda"))
    for tensor in (on_cpu, found):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    told = capsys.readouterr().err
    assert told.count("verifying 4 kernels") == 1
    assert told.count("layernorm_mlp runs as eager PyTorch") == 1


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_an_op_that_memory_does_not_suffice_for_is_asked_of_fewer_images(device: str) -> None:
    def large(x: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return OPS["layernorm_mlp"].function(x=x, **arguments)

    shape = Shape(width=64, heads=1, tokens=5, batch=8)
    op = replace(OPS["layernorm_mlp"], function=large)
    found = check.check(op, shape, torch.float32, torch.device(device), seed=0, backward=True)
    assert (found.form, found.why) == (OURS, "")
