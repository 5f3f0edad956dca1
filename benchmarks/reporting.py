"""The one page that a suite of measurements ends with, in Markdown, its pictures, and the goals it is held to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bench_loader, breakdown, loss_curves
from benchmarks.bench_train_step import OURS, PEERS, best, ratios
from benchmarks.measuring.peers_ops import FUSED
from deitfast.model.work import short_name

Row = dict[str, Any]
NOT_MEASURED = "not yet measured"
IMAGES_PER_SECOND = {"deit_base": 5100, "deit_small": 14000, "deit_tiny": 30000}
"""On one H100 at 224 px; DeiT-B's is 300 epochs of ImageNet-1k in a day."""
TIMES_BEST_PEER = 1.5
FIRST_STEP_SECONDS = 20.0
MEMORY_SHARE = 0.7
MEMORY_PEER = "timm + compile"
ATTENTION_TIMES = {"H100": (1.2, "sdpa cudnn"), "H200": (1.2, "sdpa cudnn"), "A100": (1.5, "sdpa flash")}
"""GPU -> how many times as fast as whom attention is to be, forward and backward, at DeiT-B's shape."""
INFERENCE_TIMES, INFERENCE_PEER = 1.3, "timm + compile"
EIGHT_GPUS = 25_400
"""images/s of DeiT-B, data included: 1.5 times the best that is published."""
PAPER_RUN = "torchrun --nproc-per-node 8 recipes/deit_base.py --data IMAGENET"


def rows_of(results: dict[str, Any], op: str) -> list[Row]:
    return [row for row in results["rows"] if row["key"].get("op") == op]


def write_page(results: dict[str, Any], plots: Iterable[str] = ()) -> str:
    """The page. results: what `gpu_suite` keeps in results.json; plots: names of the images beside it."""
    facts, steps = results["facts"], rows_of(results, "train_step")
    on_gpu = results["device"] == "cuda"
    lines = [f"# Training speed on {facts['gpu'] or 'a CPU'}", ""]
    if not on_gpu:
        lines += ["A rehearsal on CPU: it shows that everything runs, and says nothing of a GPU.", ""]
    lines += ["## Is it right?", "", *tests_told(rows_of(results, "tests")), *answers(rows_of(results, "smoke")), ""]
    lines += [
        "## Goals",
        "",
        goal_table(results["rows"] if on_gpu else [], facts["gpu"] or ""),
        "",
        "## Training step",
        "",
        step_table(steps),
        "",
    ]
    lines += [f"{text}." for text in ratios(steps)] + [""]
    lines += ["Every way of a model takes the same weights, batch, loss, optimiser and average, without drop-path,"]
    lines += ["and was compared with eager fp32 before it was timed. First step: from the start of the process.", ""]
    parts = rows_of(results, "breakdown")
    lines += [
        "## One step, microseconds an image",
        "",
        breakdown.table(parts, markdown=True) if parts else NOT_MEASURED,
    ]
    if parts:
        whole = parts[-1]["key"]
        lines += ["", f"{whole['model']}, batch {whole['batch']}, {whole['way']}. The budget is a plan, not a result."]
    lines += ["", "## Questions", "", *answers(rows_of(results, "question"))]
    if tables := results["parts"].get("tune", {}).get("notes", {}).get("tables"):
        lines += ["", "## Launches to commit", "", "```", *tables, "```"]
    lines += ["", "## Ops", "", op_table([row for row in results["rows"] if "pass" in row["key"]])]
    lines += ["", "## Loss curves", "", curves_verdict(rows_of(results, "loss_curves"))]
    lines += ["", "## Inference", "", inference_table(rows_of(results, "inference"))]
    lines += ["", "## Loader", "", loader_table(rows_of(results, "loader")), ""]
    lines += bench_loader.summary(rows_of(results, "loader"))
    lines += ["", "## How it was measured", "", *provenance(results)]
    for name in plots:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return "\n".join(lines) + "\n"


def _reason(row: Row) -> str | None:
    kinds = ("refused", "failed", "absent", "skipped")
    return next((f"{kind}: {row[kind]}" for kind in kinds if kind in row), None)


def _number(value: float | None, text: str = "{:,.1f}") -> str:
    return "-" if value is None else text.format(value)


def step_table(rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    lines = [
        "| model | batch | way | images/s | ms | MFU sheet % | MFU roof % | GiB | first step s | 300 epochs h | MHz |"
    ]
    lines += ["|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        key = row["key"]
        head = f"| {key['model']} | {key['batch']} | {key['way']}{' (taken over)' if row.get('reused') else ''} |"
        if reason := _reason(row):
            lines.append(f"{head} {reason.replace('|', '/')} | | | | | | | |")
            continue
        names = ("images_per_second", "ms", "mfu_datasheet_percent", "mfu_roof_percent", "memory_gib", "first_step_s")
        cells = [_number(row.get(name)) for name in (*names, "hours_300_epochs")]
        cells.append(_number(row.get("clocks", {}).get("sm_mhz"), "{:.0f}"))
        lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join(lines)


def op_table(rows: Sequence[Row]) -> str:
    """The fused op of every shape, and how many times as long the fastest baseline takes, launched the same way."""
    timed = [row for row in rows if "ms" in row]
    if not timed:
        return NOT_MEASURED
    lines = ["| op | model | tokens | batch | pass | fused ms | % of roof | fastest baseline | fused is |"]
    lines += ["|---|---|--:|--:|---|--:|--:|---|--:|"]
    for row in timed:
        key = row["key"]
        if key["way"] != FUSED:
            continue
        peers = [r for r in timed if "fused_speedup" in r and r["key"] == {**key, "way": r["key"]["way"]}]
        fastest = min(peers, key=lambda r: r["fused_speedup"], default=None)
        beside = (
            f"{fastest['key']['way']} {fastest['ms']:.4f} | {fastest['fused_speedup']:.2f} x" if fastest else "- | -"
        )
        lines.append(
            f"| {key['op']} | {key['model']} | {key['tokens']} | {key['batch']} | {key['pass']} | {row['ms']:.4f} | "
            f"{row['roof_percent']:.0f} | {beside} |"
        )
    for row in rows:
        if "refused" in row or "failed" in row:
            key = row["key"]
            lines.append(f"| {key['op']} | {key['model']} | | | {key.get('way', '')} | {_reason(row)} | | | |")
    return "\n".join(lines)


def tests_told(rows: Sequence[Row]) -> list[str]:
    """The counts of each run of the tests, and every test that failed."""
    lines = []
    for row in rows:
        if "counts" in row:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(row["counts"].items()))
            lines.append(f"- {row['key']['scope']} tests: {counts}")
        elif "failed" in row:
            lines.append(f"- FAILED `{row['key']['test']}`: {row['failed']}")
    return lines or [f"- tests: {NOT_MEASURED}"]


def answers(rows: Sequence[Row]) -> list[str]:
    """A line a row: what was asked, and what came out, in words and where it was timed in milliseconds."""
    lines = []
    for row in rows:
        asked = ", ".join(str(value) for name, value in row["key"].items() if name != "op")
        told = [f"{row['ms']:.4f} ms"] if "ms" in row else []
        told += [text for text in (row.get("answer"), _reason(row)) if text]
        lines.append(f"- {asked}: {'; '.join(told)}")
    return lines or [f"- {NOT_MEASURED}"]


def loader_table(rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    lines = ["| loader | decoding | threads | images/s | a CPU second |", "|---|---|--:|--:|--:|"]
    for row in rows:
        key = row["key"]
        speed = _reason(row) or _number(row["images_per_second"], "{:,.0f}")
        per_cpu = _number(row.get("images_per_cpu_second"), "{:,.0f}")
        lines.append(f"| {key['way']} | {key['decode']} | {key['threads']} | {speed} | {per_cpu} |")
    return "\n".join(lines)


def inference_table(rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    lines = ["| model | batch | way | images/s | latency ms |", "|---|--:|---|--:|--:|"]
    for row in rows:
        key = row["key"]
        speed, latency = _reason(row) or _number(row.get("images_per_second")), _number(row.get("ms"), "{:.2f}")
        lines.append(f"| {key['model']} | {key.get('batch', '')} | {key['way']} | {speed} | {latency} |")
    return "\n".join(lines)


def curves_verdict(rows: Sequence[Row]) -> str:
    """Whether the engine learnt like eager PyTorch, in a sentence."""
    curves = {row["key"]["way"]: row["losses"] for row in rows if "losses" in row}
    if not {loss_curves.EXACT, loss_curves.OTHER_SEED, loss_curves.OURS} <= curves.keys():
        return NOT_MEASURED
    key = rows[0]["key"]
    steps = len(curves[loss_curves.OURS])
    return f"{key['model']}, batch {key['batch']}, {steps} steps on {key['data']}: {loss_curves.verdict(curves)[1]}."


def provenance(results: dict[str, Any]) -> list[str]:
    """Machine, versions, commit, roof, and what became of each part of the suite."""
    facts, roof = results["facts"], results.get("roofs")
    versions = ", ".join(f"{name} {facts.get(name)}" for name in ("driver", "cuda", "torch", "triton", "python"))
    lines = [f"- {facts['gpu'] or facts['cpu']}, {versions}", f"- {facts['date']}, commit {facts['commit']}"]
    lines += [f"- sources {facts['sources']}; `{facts['command']}`"]
    if roof:
        lines.append(f"- roof measured in this run: {roof['tflops']:,.1f} TFLOP/s, {roof['gbps']:,.0f} GB/s")
    for when, state in (("before", facts["gpu_state"]), ("after", (results["finished"] or {}).get("gpu_state"))):
        if state:
            clocks = f"SM {state.get('sm_clock')}, memory {state.get('memory_clock')}"
            lines.append(f"- {when}: {clocks}, throttle {state.get('throttle_reasons')}, {state.get('temperature')} C")
    for name, part in results["parts"].items():
        problem = f": {part['problem']}" if part.get("problem") else ""
        lines.append(f"- part {name}: {part['status']} in {part['seconds']:.0f} s{problem}")
    return lines


# Goals ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """One line of the goal table. measured, ratio: in words; met: None where nothing was measured."""

    name: str
    goal: str
    measured: str
    peer: str
    met: bool | None


def goals(results: Sequence[Row], gpu: str = "") -> list[Goal]:
    """The table from the rows of a suite on a GPU; gpu: its name."""
    lines, rows = [], [row for row in results if row["key"].get("op") == "train_step"]
    for model, target in IMAGES_PER_SECOND.items():
        ours, peer = best(rows, model, [OURS]), best(rows, model, PEERS)
        speed = ours["images_per_second"] if ours else None
        measured, met = (f"{speed:,.0f}", speed >= target) if speed else (NOT_MEASURED, None)
        beside, ratio = NOT_MEASURED, None
        if ours and peer:
            ratio = ours["images_per_second"] / peer["images_per_second"]
            beside = f"{ratio:.2f} x {peer['key']['way']} ({peer['images_per_second']:,.0f})"
        lines.append(Goal(f"{short_name(model)}, images/s", f"{target:,}", measured, beside, met))
        met = None if ratio is None else ratio >= TIMES_BEST_PEER
        measured = NOT_MEASURED if ratio is None else f"{ratio:.2f} x"
        lines.append(Goal(f"{short_name(model)}, times the best peer", f"{TIMES_BEST_PEER:g} x", measured, "", met))
        lines += [_first_step(model, ours, peer), _memory(model, ours, best(rows, model, [MEMORY_PEER]))]
    lines += [*_attention(results, gpu), _inference(results)]
    by = f"of `{PAPER_RUN}`"
    lines.append(Goal("deit_base on 8 GPUs, with data, images/s", f"{EIGHT_GPUS:,}", NOT_MEASURED, by, None))
    lines.append(Goal("deit_base, hours to the paper's accuracy", "24", NOT_MEASURED, by, None))
    return lines


def _times(name: str, goal: float, peer: str, ratio: float | None) -> Goal:
    measured = NOT_MEASURED if ratio is None else f"{ratio:.2f} x"
    return Goal(name, f"{goal:g} x {peer}", measured, "", None if ratio is None else ratio >= goal)


def _attention(results: Sequence[Row], gpu: str) -> list[Goal]:
    """A line for this GPU, and for each where it is none of them."""
    known = [chip for chip in ATTENTION_TIMES if chip in gpu]
    lines = []
    for chip in known or ATTENTION_TIMES:
        goal, peer = ATTENTION_TIMES[chip]
        found = [
            row["fused_speedup"]
            for row in results
            if row["key"].get("op") == "attention" and row["key"].get("way") == peer and row["key"].get("model") == "B"
            and row["key"].get("pass") == "forward+backward" and "fused_speedup" in row
        ]  # fmt: skip
        lines.append(_times(f"attention on {chip}", goal, peer, min(found) if found and known else None))
    return lines


def _inference(results: Sequence[Row]) -> Goal:
    """At DeiT-B's largest batch that both were measured at."""
    speeds: dict[str, dict[int, float]] = {}
    for row in rows_of({"rows": results}, "inference"):
        if "images_per_second" in row and row["key"]["model"].startswith("deit_base"):
            speeds.setdefault(row["key"]["way"], {})[row["key"]["batch"]] = row["images_per_second"]
    both = speeds.get(OURS, {}).keys() & speeds.get(INFERENCE_PEER, {}).keys()
    ratio = speeds[OURS][max(both)] / speeds[INFERENCE_PEER][max(both)] if both else None
    return _times("deit_base, inference", INFERENCE_TIMES, INFERENCE_PEER, ratio)


def _first_step(model: str, ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> Goal:
    name, goal = f"{model}, first step", f"within {FIRST_STEP_SECONDS:g} s"
    if ours is None:
        return Goal(name, goal, NOT_MEASURED, "", None)
    beside = f"{peer['key']['way']}: {peer['first_step_s']:.1f} s" if peer else ""
    return Goal(name, goal, f"{ours['first_step_s']:.1f} s", beside, ours["first_step_s"] <= FIRST_STEP_SECONDS)


def _memory(model: str, ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> Goal:
    name, goal = f"{model}, peak memory", f"{MEMORY_SHARE:g} x {MEMORY_PEER}"
    if not (ours and peer and "memory_gib" in ours and "memory_gib" in peer):
        return Goal(name, goal, NOT_MEASURED, "", None)
    share = ours["memory_gib"] / peer["memory_gib"]
    beside = f"{ours['memory_gib']:.1f} of {peer['memory_gib']:.1f} GiB"
    return Goal(name, goal, f"{share:.2f} x", beside, share <= MEMORY_SHARE)


def goal_table(rows: Sequence[Row], gpu: str = "") -> str:
    """Markdown."""
    lines = ["| | goal | measured | beside the best peer | met |", "|---|--:|--:|---|---|"]
    words = {True: "yes", False: "no", None: ""}
    for line in goals(rows, gpu):
        lines.append(f"| {line.name} | {line.goal} | {line.measured} | {line.peer} | {words[line.met]} |")
    return "\n".join(lines)


# Pictures (PNG) ------------------------------------------------------------------------------------------------------


def draw_all(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw what there is data for into `folder`; the names of the files. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, draw in (
        ("throughput", throughput_figure),
        ("roofline", roofline_figure),
        ("breakdown", breakdown_figure),
    ):
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
            drawn.append(f"{name}.png")
    return drawn


def _figure(title: str, results: dict[str, Any], **kwargs: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(**kwargs)
    axes = figure.subplots()
    where = results["facts"]["gpu"] or "CPU rehearsal"
    axes.set_title(f"{title}\n{where}, torch {results['facts']['torch']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def throughput_figure(results: dict[str, Any]) -> Any:
    """images/s, a group of bars a model; None without rows."""
    rows = [row for row in results["rows"] if row["key"].get("op") == "train_step" and "ms" in row]
    if not rows:
        return None
    figure, axes = _figure("Training step, images/s (whiskers: 20th to 80th percentile)", results, figsize=(9, 5))
    ways = list(dict.fromkeys(row["key"]["way"] for row in rows))
    models = list(dict.fromkeys(row["key"]["model"] for row in rows))
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        for row in (row for row in rows if row["key"]["way"] == way):
            x = models.index(row["key"]["model"]) + i * width
            speed, scale = row["images_per_second"], row["images_per_second"] * row["ms"]
            low, high = (scale / max(run[name] for run in row["runs"]) for name in ("p80_ms", "p20_ms"))
            whiskers = [[max(speed - low, 0)], [max(high - speed, 0)]]
            first = row["key"]["model"] == next(r["key"]["model"] for r in rows if r["key"]["way"] == way)
            axes.bar(x, speed, width, color=f"C{i % 10}", yerr=whiskers, capsize=2, label=way if first else None)
            axes.text(x, max(speed, high), f"{speed:,.1f}", ha="center", va="bottom", fontsize=6)
    axes.set_xticks([m + 0.4 - width / 2 for m in range(len(models))], models)
    axes.legend(fontsize=7, frameon=False)
    return figure


def roofline_figure(results: dict[str, Any]) -> Any:
    """Achieved TFLOP/s over FLOP/byte of every timed op, under the measured roof; None without rows or roof."""
    rows = [row for row in results["rows"] if "pass" in row["key"] and row.get("gbps")]
    roof = results.get("roofs")
    if not rows or not roof:
        return None
    figure, axes = _figure("Ops under the measured roof (each op's least FLOPs and bytes)", results, figsize=(9, 5))
    for i, way in enumerate(dict.fromkeys(row["key"]["way"] for row in rows)):
        chosen = [row for row in rows if row["key"]["way"] == way]
        intensity = [1e3 * row["tflops"] / row["gbps"] for row in chosen]
        marker = "o" if way.startswith("fused") else "x"
        axes.scatter(intensity, [row["tflops"] for row in chosen], s=18, marker=marker, color=f"C{i % 10}", label=way)
    ridge = 1e3 * roof["tflops"] / roof["gbps"]
    left = min(1e3 * row["tflops"] / row["gbps"] for row in rows) / 2
    xs = [left, ridge, max(10 * ridge, left * 4)]
    axes.plot(xs, [min(x * roof["gbps"] / 1e3, roof["tflops"]) for x in xs], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7, frameon=False)
    return figure


def breakdown_figure(results: dict[str, Any]) -> Any:
    """Microseconds an image of each part of a step, with floor and budget; None without rows."""
    rows = [row for row in results["rows"] if row["key"].get("op") == "breakdown" and row["key"]["part"] != "step"]
    if not rows:
        return None
    key = rows[0]["key"]
    figure, axes = _figure(f"One step of {key['model']}, batch {key['batch']}, {key['way']}", results, figsize=(9, 4))
    names = [row["key"]["part"] for row in rows]
    colours = ["C3" if row["over"] else "C0" for row in rows]
    axes.barh(names, [row["us_image"] for row in rows], color=colours, height=0.6)
    for kind, colour in (("floor_us", "black"), ("budget_us", "C1")):
        marked = [(row["key"]["part"], row[kind]) for row in rows if row[kind]]
        if marked:
            names_, values = zip(*marked, strict=True)
            axes.scatter(values, names_, marker="|", s=300, color=colour, label=kind.removesuffix("_us"), zorder=3)
    axes.invert_yaxis()
    axes.set_xlabel("us an image (red: over budget)")
    axes.legend(fontsize=7, frameon=False)
    return figure
