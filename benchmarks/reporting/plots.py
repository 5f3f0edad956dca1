"""Three pictures of a suite's results (PNG): throughput by model and peer, the ops under their roof, a step's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw_all(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw what there is data for into `folder`; the names of the files. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, draw in (("throughput", throughput), ("roofline", roofline), ("breakdown", breakdown)):
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


def throughput(results: dict[str, Any]) -> Any:
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


def roofline(results: dict[str, Any]) -> Any:
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


def breakdown(results: dict[str, Any]) -> Any:
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
