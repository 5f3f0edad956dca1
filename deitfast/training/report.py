"""report.html: what a run was and how it went, on one page that opens anywhere, without a network.

For one run or several beside each other, live or ended. Curves are read from metrics.jsonl and lie in the page as
numbers, too (`<script id="numbers">`). What needs images (what training saw, confusion, calibration, worst classes) is
computed from the run's data and its best weights, where both are at hand.
"""

from __future__ import annotations

import base64
import html
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deitfast.data import Dataset, open_dataset
from deitfast.data.manifest import read_manifest
from deitfast.data.show import contact_sheet
from deitfast.distributed import start
from deitfast.errors import DeitfastError
from deitfast.files import write_atomically
from deitfast.model.factory import LoadedModel, load_model
from deitfast.model.zoo import find_variant
from deitfast.training.charts import Chart, charts, svg
from deitfast.training.run import IMAGES
from deitfast.training.run_folder import duration
from deitfast.training.run_record import RunRecord
from deitfast.use.eval_plots import calibration_figure, confusion_figure
from deitfast.use.evaluate import Details, Scores, evaluate_in_detail

_COLOURS = ("#1f6feb", "#d1570b", "#1a7f37", "#8250df", "#bf3989", "#57606a", "#9a6700", "#0550ae")
_MOST_ON_CPU = 2000  # images that are evaluated where no GPU is
_VIEWS, _WORST, _FAULTS = 24, 10, 30  # shown of each
_PAGE_WIDTH = 1148  # pixels, within its margins


@dataclass(frozen=True)
class Seen:
    """What a run's data and weights show. sheet: PNG of what training saw. what is missing is told in `problems`."""

    sheet: bytes | None = None
    scores: Scores | None = None
    details: Details | None = None
    classes: tuple[str, ...] = ()
    of_all: int = 0  # validation images that there are
    problems: tuple[str, ...] = ()


def look(run: RunRecord, device: str = "auto") -> Seen:
    """Everything that needs the run's images or weights; what cannot be had is a sentence, not an error."""
    problems: list[str] = []

    def tried(what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except DeitfastError as error:
            problems.append(f"{what}: {error}")
            return None

    data = tried("no images", lambda: open_dataset(run.recipe.data, quiet=True))
    if data is None:
        return Seen(problems=tuple(problems))
    sheet = tried("no picture of what training saw", lambda: _sheet(run, data))
    loaded = tried("no weights to evaluate", lambda: load_model(None, run.path))
    found = tried("not evaluated", lambda: _evaluated(run, data, loaded, device)) if loaded else None
    scores, details = found or (None, None)
    return Seen(sheet, scores, details, tuple(data.classes), len(data.val or ()), tuple(problems))


def _sheet(run: RunRecord, data: Dataset) -> bytes:
    if data.train is None:
        raise DeitfastError(f"{run.recipe.data} has no training images")
    size = run.recipe.image_size or find_variant(run.recipe.model).image_size
    epoch = min(int(run.steps[-1]["epoch"]) if run.steps else 0, run.recipe.epochs - 1)
    written = io.BytesIO()
    count = min(_VIEWS, run.recipe.batch)
    contact_sheet(data.train, run.recipe, size, epoch, count, width=_PAGE_WIDTH).save(written, "PNG", optimize=True)
    return written.getvalue()


def _evaluated(run: RunRecord, data: Dataset, loaded: LoadedModel, device: str) -> tuple[Scores, Details]:
    if data.val is None:
        raise DeitfastError(f"{run.recipe.data} has no validation images")
    if loaded.stored is not None and tuple(loaded.stored) != tuple(data.classes):
        raise DeitfastError(f"the classes of {run.recipe.data} are not those of the weights")
    world = start(device)
    val = data.val.spread(_MOST_ON_CPU) if world.device.type == "cpu" else data.val
    return evaluate_in_detail(
        loaded.model.to(world.device), val, world, crop_ratio=run.recipe.eval_crop_ratio, batch=64,
        workers=run.recipe.workers, bf16=world.wants_bf16(run.recipe.precision), preprocessing=loaded.preprocessing,
    )  # fmt: skip


# The page ------------------------------------------------------------------------------------------------------------


def write_report(runs: Sequence[RunRecord], seen: Sequence[Seen], out: Path, price: float = 0.0) -> None:
    """Write the page of `runs`, with what `look` saw of each. price: of an hour of one GPU, in any currency; 0: none.

    Raises DeitfastError where the file cannot be written.
    """
    text = page(runs, seen, price)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise DeitfastError(f"cannot write {out}: {error.strerror}. Change --out") from error


def page(runs: Sequence[RunRecord], seen: Sequence[Seen], price: float) -> str:
    """The whole page as HTML."""
    runs = _named_apart(runs)
    colours = {run.name: _COLOURS[i % len(_COLOURS)] for i, run in enumerate(runs)}
    drawn = charts(runs)
    title = " and ".join(run.name for run in runs)
    sections = [
        f"<h1>{_text(title)}</h1>",
        _summary(runs, colours, price),
        "<h2>Curves</h2>",
        '<div class="charts">' + "".join(f"<figure>{svg(chart, colours)}</figure>" for chart in drawn) + "</div>",
    ]
    for run, what in zip(runs, seen, strict=True):
        sections += _of_run(run, what, several=len(runs) > 1)
    numbers = json.dumps(_numbers(drawn)).replace("</", "<\\/")
    sections.append(f'<script type="application/json" id="numbers">{numbers}</script>')
    return _PAGE.format(title=_text(title), body="\n".join(sections))


def _named_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs whose folders have one name are told apart by their whole path."""
    count = Counter(run.name for run in runs)
    return [run if count[run.name] == 1 else replace(run, name=str(run.path)) for run in runs]


def _numbers(drawn: Sequence[Chart]) -> dict[str, Any]:
    return {
        chart.key: [
            {"run": s.run, "averaged": s.dashed, "epochs": s.epochs, "values": s.values}
            for s in chart.series
            if s.values
        ]
        for chart in drawn
    }


def _summary(runs: Sequence[RunRecord], colours: dict[str, str], price: float) -> str:
    """A row a fact and a column a run, which a phone shows without scrolling."""
    facts = [_facts(run, colours[run.name], price) for run in runs]
    rows = [(name, *(of_run[name] for of_run in facts)) for name in facts[0]]
    told = "Training: the measured steps alone. Wall clock: first to last line of log.txt, pauses included."
    if price:
        told += f" Cost: hours of training x GPUs x {price:g}."
    return f'<div class="wide">{_table(rows, escaped=True)}</div><p class="small">{told}</p>'


def _facts(run: RunRecord, colour: str, price: float) -> dict[str, str]:
    """What the summary says of a run, as HTML."""
    last = run.evaluations[-1] if run.evaluations else {}
    gpus = run.processes if run.environment.get("gpu") else 0
    best = f"{run.best[0]:.2f} % (epoch {run.best[1]:g}, {run.best[2]})" if run.best else "-"
    raw = f"{last['top1']:.2f}" if last else "-"
    return {
        "run": f'<span class="dot" style="background:{colour}"></span>{_text(run.name)}',
        "model": _text(run.recipe.model),
        "state": run.state,
        "steps": f"{run.step:,}",
        "top-1 best": best,
        "last raw / EMA": f"{raw} / {last['ema_top1']:.2f} %" if "ema_top1" in last else f"{raw} %" if last else raw,
        "images/s": f"{_mean_speed(run):,.0f}" if run.steps else "-",
        "training": duration(3600 * run.training_hours),
        "wall clock": duration(3600 * run.hours) if run.hours is not None else "-",
        "cost": f"{price * run.training_hours * gpus:,.2f}" if price and gpus else "-",
        "faults": str(len(run.faults)),
    }


def _mean_speed(run: RunRecord) -> float:
    return run.steps[-1]["step"] * run.recipe.batch / max(3600 * run.training_hours, 1e-9)


def _of_run(run: RunRecord, seen: Seen, several: bool) -> Iterator[str]:
    yield f"<h2>{_text(run.name)}</h2>" if several else ""
    if seen.sheet:
        yield "<h3>What training saw</h3>"
        yield '<p class="small">Views of the last epoch begun, before erasing and mixing, each with its operations.</p>'
        picture = f'<img class="sheet" alt="views of training images" src="{_data_url(seen.sheet)}">'
        yield f'<div class="wide">{picture}</div>'
    if seen.scores and seen.details:
        yield from _evaluation(seen)
    for problem in seen.problems:
        yield f'<p class="small">{_text(problem)}</p>'
    yield "<h3>Settings against the paper</h3>"
    listed = read_manifest(run.path / IMAGES)
    words = run.recipe.deviations(None if listed is None else len(listed))
    items = "".join(f"<li>{_text(word)}</li>" for word in words)
    yield f"<ul>{items}</ul>" if words else "<p>Every setting is the DeiT paper's.</p>"
    yield "<h3>Run it again</h3>"
    yield f"<pre>{_text(command(run))}</pre>"
    yield "<h3>Environment</h3>"
    yield _environment(run)
    if run.faults:
        yield "<h3>Faults</h3>"
        newest = run.faults[-_FAULTS:]
        rows = [("time", "kind", "step", "what")]
        for f in newest:
            what = f.get("what", f.get("cause", f.get("count", "")))
            rows.append((str(f.get("time", "")), f["kind"], str(f.get("step", "")), str(what)))
        yield f'<div class="wide">{_table(rows)}</div>'
        if len(newest) < len(run.faults):
            yield f'<p class="small">The last {len(newest)} of {len(run.faults)}; faults.jsonl has all.</p>'


def _evaluation(seen: Seen) -> Iterator[str]:
    scores, details = seen.scores, seen.details
    assert scores is not None
    assert details is not None
    part = "" if scores.images >= seen.of_all else f" of {seen.of_all:,}, at even distances (no GPU here)"
    yield "<h3>The best weights</h3>"
    yield (
        f"<p>Top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % on {scores.images:,} validation images{part}; "
        f"calibration error {details.ece:.3f}.</p>"
    )
    figures = [confusion_figure(details, seen.classes), calibration_figure(details)]
    pictures = "".join(f'<figure><img alt="" src="{_data_url(_png(figure))}"></figure>' for figure in figures)
    yield f'<div class="charts">{pictures}</div>'
    rows = [("hardest classes", "top-1", "images", "most often taken for")]
    per_class, counts = details.per_class.tolist(), details.confusion.sum(1).tolist()
    ranked = sorted((value, i) for i, value in enumerate(per_class) if value == value)
    for value, i in ranked[:_WORST]:
        wrong = details.confusion[i].clone()
        wrong[i] = 0
        other = int(wrong.argmax())
        taken = f"{seen.classes[other].split(',')[0]} ({int(wrong[other])})" if int(wrong[other]) else "-"
        rows.append((seen.classes[i].split(",")[0], f"{value:.1f}\u00a0%", str(counts[i]), taken))
    yield f'<div class="wide">{_table(rows)}</div>'


def command(run: RunRecord) -> str:
    """The command that makes this run again, from its env.json."""
    given = [str(word) for word in run.environment.get("command", [])] or ["recipes/RECIPE.py", "--out", str(run.path)]
    many = f"torchrun --nproc-per-node {run.processes}" if run.processes > 1 else "python"
    commit = run.environment.get("commit")
    return f"{many} {shlex.join(given)}" + (f"    # commit {commit[:12]}" if commit else "")


def _environment(run: RunRecord) -> str:
    environment = run.environment
    gpu = environment.get("gpu") or {}
    told = ("python", "torch", "triton", "processor", "cores")
    rows = [(key, str(environment[key])) for key in told if key in environment]
    rows.append(("GPU", f"{gpu.get('count')} x {gpu.get('name')}, CUDA {gpu.get('cuda')}" if gpu else "none"))
    rows.append(("processes", str(run.processes)))
    rows.append(("started", f"{environment.get('started', '?')}, {run.starts} start(s)"))
    rows += [("step", str(environment["step"]))] if "step" in environment else []
    rows += [("code", str(environment.get("commit") or environment.get("code") or "?"))]
    return f'<div class="wide">{_table(rows, head=False)}</div>'


# Pieces of HTML ------------------------------------------------------------------------------------------------------


def _text(value: str) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[Sequence[str]], *, head: bool = True, escaped: bool = False) -> str:
    """rows: the first is the head, where there is one. escaped: cells are HTML already."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if head and i == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{cell if escaped else _text(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=100)
    return written.getvalue()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2328; background: #fff;
  margin: 0 auto; max-width: 1180px; padding: 16px; }}
h1 {{ font-size: 1.6em; overflow-wrap: anywhere; }} h2 {{ margin-top: 2em; border-bottom: 1px solid #d0d7de; }}
h3 {{ margin-bottom: .3em; }}
table {{ border-collapse: collapse; }} td, th {{ text-align: left; padding: 4px 12px 4px 0; vertical-align: top;
  border-bottom: 1px solid #eaeef2; }} td:first-child {{ white-space: nowrap; }}
td:last-child {{ overflow-wrap: anywhere; min-width: 7em; }}
.wide {{ overflow-x: auto; }} .small {{ color: #57606a; font-size: 13px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px; }}
figure {{ margin: 0; }} figure svg, figure img {{ width: 100%; height: auto; }}
pre {{ background: #f6f8fa; padding: 10px; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px; }}
.dot {{ display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
