"""Every micro benchmark and the tuner, rehearsed on CPU; a planted wrong op gets no number."""

from __future__ import annotations

import dataclasses
import inspect
import json
import time

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks import compile_report, micro, sanitize, tune, workshop
from benchmarks.measuring import peers_ops
from benchmarks.measuring.command import Finished
from benchmarks.measuring.harness import Budget, Ran, Recorder, Refused, Timing, load
from benchmarks.measuring.ops import OPS, WORK
from deitfast.kernels import layernorm
from deitfast.kernels.catalogue import Draw, Shape
from deitfast.kernels.common import INTERPRETED, Launch
from deitfast.kernels.tunable import PICKED

QUICK = ["--device", "cpu", "--quick"]


@pytest.mark.parametrize("op", OPS)
def test_the_quick_path_times_every_way_in_both_directions(op, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert micro.main([op, *QUICK, "--out", str(out)]) == 0
    data = load(out)
    timed = {(row["key"]["op"], row["key"]["way"], row["key"]["pass"]) for row in data["rows"] if "ms" in row}
    for way in ("fused", "eager", "torch.compile"):
        assert (op, way, "forward") in timed
        assert ((op, way, "forward+backward") in timed) == (op != "input_patches")
    for row in data["rows"]:
        assert "ms" in row or row.keys() & {"absent", "failed"}
        if "ms" in row:
            assert len(row["runs"]) == 2
            assert row["tflops"] >= 0
            assert row["gbps"] > 0
            assert row["roof_percent"] > 0
            assert ("fused_speedup" in row) == (row["key"]["way"] != "fused")
    assert data["roofs"]["tflops"] > 0
    assert data["finished"]
    assert f"== {op}\n" in capsys.readouterr().out


def test_every_attention_baseline_is_named_also_where_it_cannot_run(tmp_path):
    out = tmp_path / "results.json"
    assert micro.main(["attention", *QUICK, "--no-compile", "--out", str(out)]) == 0
    named = {row["key"]["way"] for row in load(out)["rows"]}
    assert named == {"fused", "eager", *peers_ops.SDPA, "flash-attn 2", "flash-attn 3", "flash-attn 4"}


def test_what_cannot_be_captured_is_compared_with_the_fused_op_launched_from_the_host(monkeypatch, tmp_path):
    times = {"fused": (1.0, "graph"), "fused, from the host": (4.0, "stream"), "eager": (3.0, "graph")}

    def in_turns(calls, **_):
        found = {name: times.get(name, (8.0, "stream")) for name in calls}
        return {name: Ran([Timing(ms, ms, ms, 9)] * 2, launch) for name, (ms, launch) in found.items()}

    monkeypatch.setattr(micro, "in_turns", in_turns)
    out = tmp_path / "results.json"
    assert micro.main(["input_patches", *QUICK, "--out", str(out)]) == 0
    ratios = {row["key"]["way"]: row.get("fused_speedup") for row in load(out)["rows"]}
    assert ratios == {
        "fused": None,
        "fused, from the host": None,
        "eager": 3.0,
        "torch.compile": 2.0,
    }


def planted(break_it):
    """OPS with a `mlp_gelu` whose result `break_it` has changed."""
    op = OPS["mlp_gelu"]
    return OPS | {"mlp_gelu": dataclasses.replace(op, function=lambda **tensors: break_it(op.function, tensors))}


def double_one_gradient(fused, tensors):
    bias = tensors["fc1_bias"]
    return fused(**tensors | {"fc1_bias": 2 * bias - bias.detach()})


PLANTED = {
    "an output": lambda fused, tensors: fused(**tensors) * 1.1,
    "one gradient": double_one_gradient,
    "a shape": lambda fused, tensors: fused(**tensors)[:-1],
}


@pytest.mark.parametrize("break_it", PLANTED.values(), ids=PLANTED)
def test_a_wrong_op_gets_no_number(break_it, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert micro.main(["mlp_gelu", *QUICK, "--out", str(out)], ops=planted(break_it)) == 1
    rows = load(out)["rows"]
    assert rows
    assert [row for row in rows if "refused" in row]
    assert all(("refused" in row or "absent" in row) and not row.keys() & {"ms", "runs", "tflops"} for row in rows)
    captured = capsys.readouterr()
    assert "refused: " in captured.out
    assert " ms " not in captured.out.replace("fused ms ", "")
    assert "REFUSED mlp_gelu" in captured.err


def test_a_planted_slow_down_of_an_op_is_measured(tmp_path):
    def slow(fused, tensors):
        time.sleep(0.03)
        return fused(**tensors)

    out = tmp_path / "slow.json"
    assert micro.main(["mlp_gelu", *QUICK, "--no-compile", "--out", str(out)], ops=planted(slow)) == 0
    key = {"way": "fused", "pass": "forward"}
    (row,) = [row for row in load(out)["rows"] if key.items() <= row["key"].items()]
    assert row["ms"] > 30


def test_what_there_is_no_time_for_is_listed(tmp_path):
    out = tmp_path / "results.json"
    assert micro.main(["mlp_gelu", *QUICK, "--minutes", "0", "--out", str(out)]) == 0
    rows = load(out)["rows"]
    assert len(rows) == 2
    assert all(row["skipped"] == "no time left" for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("main", "name"), [(micro.main, "micro"), (tune.main, "tune")])
def test_without_a_gpu_it_says_so(main, name, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == f"{name}: no CUDA device; --device cpu --quick rehearses on CPU\n"


def test_no_shape_left_is_said(capsys):
    assert micro.main([*QUICK, "--models", "B"]) == 2
    assert "no shape is left of Ti 3 x 5" in capsys.readouterr().err


def test_an_unknown_op_is_told_with_the_nearest(capsys):
    assert micro.main(["atention", *QUICK]) == 2
    assert capsys.readouterr().err == "micro: op 'atention' unknown. Did you mean attention?\n"


@pytest.mark.parametrize("name", OPS)
def test_the_work_is_what_the_matrix_products_do(name):
    """FLOPs against torch's own counter, which sees the matrix products that run."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape.of("Ti", 5, 3)
    case = micro.Case(OPS[name], shape, "cpu", torch.float32)
    inputs = case.inputs()
    work = WORK[name](shape)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        case.forward(case.op.reference, inputs)
    with FlopCounterMode(display=False) as both:
        case.both(case.op.reference, inputs)
    if name not in ("attention", "layernorm_attention", "block"):  # the counter does not know attention on CPU
        assert forward.get_total_flops() == work.forward_flops
        assert both.get_total_flops() == work.forward_flops + work.backward_flops
    elif name == "attention":
        # q k^T and p v forward; five products backward: s again, dp, dv, dq, dk
        product = 2 * shape.batch * shape.tokens**2 * shape.width
        assert (work.forward_flops, work.backward_flops) == (2 * product, 5 * product)


@pytest.mark.parametrize("name", ["linear_residual", "block"])
def test_the_reference_in_pieces_is_the_reference(name):
    """Per-sample gradients are joined, those of parameters added up."""
    case = micro.Case(OPS[name], Shape.of("Ti", 5, 5), "cpu", torch.float64)
    inputs = case.inputs()
    whole, pieces = case.both(case.op.reference, inputs), case.exact(inputs, chunk=2)
    assert whole.keys() == pieces.keys()
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value, rtol=1e-10, atol=1e-10)


def test_the_sanitizer_runs_each_op_in_a_process_and_reports_one_that_fails(tmp_path, monkeypatch):
    out = tmp_path / "sanitize.json"
    assert sanitize.main([*QUICK, "--only", "layernorm", "--out", str(out)]) == 0
    assert load(out)["rows"][0]["verdict"] == "clean"
    found = Finished(9, "Invalid read of size 4\n", "", 1.0)
    monkeypatch.setattr(sanitize, "run_limited", lambda *_: found)
    assert sanitize.main([*QUICK, "--only", "layernorm", "--out", str(out)]) == 1
    assert (load(out)["rows"][0]["verdict"], load(out)["rows"][0]["tail"]) == ("FAILED", ["Invalid read of size 4"])


# The tuner -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="nothing compiles in the interpreter")
def test_the_tuner_rehearses_without_a_number(tmp_path, capsys):
    out = tmp_path / "tune.json"
    assert tune.main([*QUICK, "--only", "layernorm", "--models", "Ti", "--out", str(out)]) == 0
    rows = load(out)["rows"]
    assert len(rows) == 4, "two kernels, two candidates each"
    assert all(row["checked"] and row["short_ms"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "nothing was timed" in printed
    assert "layernorm_launch stage=fwd columns=192 itemsize=2: BLOCK_M=" in printed
    assert " ms" not in printed


@pytest.mark.skipif(INTERPRETED, reason="nothing compiles in the interpreter")
def test_a_candidate_that_compiles_badly_is_dropped_and_survivors_are_kept(tmp_path, monkeypatch):
    bad = Launch({"BLOCK_M": 32, "BLOCK_D": 256}, num_warps=1, num_stages=2, programs=528)
    monkeypatch.setattr(
        layernorm.layernorm_launch, "_space", lambda stage, columns, itemsize: [bad] if stage == "bwd" else []
    )
    survivors, out = tmp_path / "survivors.json", tmp_path / "tune.json"
    command = [*QUICK, "--only", "layernorm", "--models", "Ti"]
    assert tune.main([*command, "--compile-only", str(survivors)]) == 0
    verdicts = json.loads(survivors.read_text())
    (name,) = [name for name in verdicts if name.startswith("layernorm_bwd")]
    current, dropped = verdicts[name].values()
    assert current == ""
    assert "spills" in dropped

    def never(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compile_report, "compile_case", never)
    assert tune.main([*command, "--compiled", str(survivors), "--out", str(out)]) == 0
    assert [row["failed"] for row in load(out)["rows"] if "failed" in row] == [dropped]


def test_a_wrong_candidate_is_not_timed():
    """A kernel that a launch makes wrong: the site's call is changed while the candidate is applied."""
    site = next(site for site in workshop.sites(1) if site.name.startswith("layernorm_fwd Ti"))
    right, wrong, *_ = site.candidates(90)

    def call(tensors):
        (out,) = site.call(tensors)
        return (out * 1.5,) if wrong in PICKED.values() else (out,)

    trial = tune.Trial(dataclasses.replace(site, call=call), 90, "cpu")
    trial.check(right)
    with pytest.raises(Refused, match="layernorm_fwd"):
        trial.check(wrong)


@pytest.mark.parametrize("site", workshop.sites(1), ids=lambda site: site.name)
def test_every_site_is_right_on_cpu_and_its_candidates_reach_the_kernel(site):
    if INTERPRETED:
        pytest.skip("the interpreter has launches of its own")
    trial = tune.Trial(site, 90, "cpu")
    current, *others = site.candidates(90)
    trial.check(current)
    inputs = site.inputs(Draw(0, torch.float32, "cpu"), site.shape)
    assert inputs.keys() == trial.sets[0].keys()
    for candidate in (others[0], others[-1]):
        with site.apply(90, candidate):
            cases = [case.traits() for case in site.cases(90)]
            if candidate is not None:
                tiles = {name: value for name, value in candidate.tiles.items() if value and name != "TMA"}
                wanted = {name: str(value) for name, value in (tiles | candidate.options()).items()}
                assert any(wanted.items() <= case.items() for case in cases)
    assert site.candidates(90)[0] == current, "the package's table is as it was"


def test_a_rival_that_does_no_more_is_timed_beside_the_winner(monkeypatch):
    """qkv's product is a bias only, which cuBLAS adds itself."""
    site = next(site for site in workshop.sites(1) if site.name.startswith("gemm linear B"))
    assert site.rival
    assert not [s.name for s in workshop.sites(1) if s.rival and "linear" not in s.name]

    class Trial:
        sets = ("tensors",)

        def __init__(self, *_):
            pass

        def check(self, candidate):
            pass

        def time(self, candidate, budget_ms):
            return Timing(2.0, 2.0, 2.0, 9)

    def in_turns(calls, **_):
        assert calls == {site.rival: site.eager}
        return {site.rival: Ran([Timing(3.0, 3.0, 3.0, 9)] * 2, "graph")}

    monkeypatch.setattr(tune, "Trial", Trial)
    monkeypatch.setattr(tune, "in_turns", in_turns)
    recorder, none = Recorder(None, "tune", "cpu"), {}
    current, _ = tune.tune_site(site, 90, "cuda", True, none, recorder, Budget(1))
    assert tune.beside_rival(recorder.rows, site, current) == f"; {site.rival} takes 1.50 x as long"
    assert tune.beside_rival([], site, current) == ""


def test_triton_still_launches_as_the_tuner_expects():
    parameters = inspect.signature(JITFunction.run).parameters
    assert {"grid", "warmup"} <= parameters.keys()
