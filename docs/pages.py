"""Writes the pages that repeat what the code says: recipes.md, kernels.md, api.md, the bounds of performance.md.

python docs/pages.py            # rewrites them
python docs/pages.py --check    # exit status 1 where one is out of date
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import deitfast
from deitfast import kernels
from deitfast.model.work import GPUS, IMAGENET_IMAGES, forward_macs, mfu, model_flops, part_floors
from deitfast.recipe import Recipe
from deitfast.training.estimate import least_hours

DOCS = Path(__file__).parent
ROOT = DOCS.parent
WRITTEN = "<!-- written by docs/pages.py -->"

KERNELS = (
    ("The block", "layernorm_attention_op layernorm_mlp_op"),
    ("Its parts", "layernorm_qkv_op attention_op linear_residual_op mlp_gelu_op layernorm layernorm_linear gemm"),
    ("Drop-path that skips the compute", "subset_rows row_sums"),
    ("The way in", "input patch_embed_op"),
    ("Loss and update", "loss optimizer"),
    ("Augmentation", "image_ops photometric warp blur"),
)
"""Chapters of kernels.md, and the modules in each."""


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def as_markdown(text: str) -> Iterator[str]:
    """A docstring as lines of a page: indented paragraphs are formulas, `name: ...` begins an item, the rest flows."""
    fenced = False
    for paragraph in re.split(r"\n\n+", text.strip("\n")):
        lines = paragraph.splitlines()
        formulas = all(line.startswith("    ") for line in lines)
        if fenced and not formulas:
            yield "```"
        yield ""
        if formulas:
            if not fenced:
                yield "```text"
            yield from _formulas([line[4:] for line in lines])
        else:
            yield from _flowing(lines)
        fenced = formulas
    if fenced:
        yield "```"


def _formulas(lines: Sequence[str]) -> Iterator[str]:
    """A formula a line, where several stand in one with six spaces between; an aligned table stays as it is."""
    aligned = any(set(re.findall(" {2,}", line)) - {" " * 6} or line.startswith(" ") for line in lines)
    for line in lines:
        yield from [line] if aligned else re.split(r" {6}(?=(?:(?! {6}).)* = )", line)


def _flowing(lines: Sequence[str]) -> Iterator[str]:
    """A paragraph, with an item for each parameter that it describes."""
    name = r"[a-z_]\w*(?:, \w+)*: "
    text = "\n".join(lines)
    if not re.search(rf"(?:\A|\.\n){name}", text):
        yield from map(_escaped, lines)
        return
    listed = True
    for part in re.split(rf"(?<=\.)\s+(?={name}|Raises |Returns )", text):
        names, _, words = part.partition(": ")
        item = re.match(name, part)
        if bool(item) != listed:
            yield ""
        listed = bool(item)
        flowing = f"- `{names}`: {_escaped(words)}" if item else _escaped(part)
        yield textwrap.fill(" ".join(flowing.split()), 116, subsequent_indent="  " * listed, **_WORDS)


def _escaped(text: str) -> str:
    """What Markdown, HTML or GitHub's formulas would take for their own, outside of `code`, made plain."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        plain = re.sub(r"[*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", parts[i])
        parts[i] = plain.replace("<", "&lt;").replace("$", "&#36;")
    return "".join(parts)


# Recipes -------------------------------------------------------------------------------------------------------------


def recipes_page() -> str:
    """Every shipped recipe in one table, then how each differs from the DeiT paper's."""
    rows, differences = [], []
    for path in sorted((ROOT / "recipes").glob("[!_]*.py")):
        recipe, text = importlib.import_module(f"deitfast.recipes.{path.stem}").RECIPE, docstring(path)
        expected = re.search(r"Expected top-1[^:]*:\s+([\d.]+ %)", text)
        top1 = expected[1] if expected else ""
        images = re.search(r"([\d,]+) images of [\d,]+ classes", text)
        count = int(images[1].replace(",", "")) if images else IMAGENET_IMAGES
        hours = f"{least_hours(recipe, GPUS['h100'], count):.1f}" if expected else ""
        status = "not yet run" if "Not yet run" in text else "see its file"
        size = recipe.image_size or int(re.findall(r"\d+", recipe.model)[-1])
        link = f"[{path.stem}](../recipes/{path.name})"
        rows.append(f"| {link} | {size} | {recipe.epochs} | {top1} | {status} | {hours} |")
        found = recipe.deviations()
        if found:
            differences.append(f"- **{path.stem}**: {'; '.join(found)}")
    return "\n".join(
        [
            "# Recipes",
            WRITTEN,
            "",
            "A recipe is one Python file that states every setting. Its docstring has the command, the expected",
            "accuracy and its source, and what of the authors' procedure it cannot follow. Top-1 on ImageNet-1k's",
            "validation set, or on the data set's own. Our results come with their run folder:",
            "[RESULTS.md](../RESULTS.md).",
            "",
            "Hours are the least that one H100 can need: the roofline's bound for the training steps, which",
            "`deitfast estimate RECIPE` prints, without data, evaluation and a distillation's teacher. **No recipe has",
            "been timed on a GPU yet.**",
            "",
            "| recipe | px | epochs | expected | ours | hours, at least |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "## How each differs from the DeiT paper's",
            "",
            "A run prints these, too, and how its flags differ from its file.",
            "",
            *differences,
            "",
            "## What the paper leaves open",
            "",
            *_opening(Recipe),
        ]
    )


def _opening(recipe: type[Recipe]) -> Iterator[str]:
    """The settings whose default is not the paper's, of which there should be none, and where the paper's come from."""
    for f in fields(recipe):
        if "paper" in f.metadata and f.default != f.metadata["paper"]:
            yield f"- {f.name}: {f.default} here, {f.metadata['paper']} in the paper"
    yield from (
        "- Settings are those of table 9 and of the authors' main.py; `--deit-compat` also takes over two quirks of",
        "  their code: a learning rate that stays the same for a whole epoch, and a decayed distillation token.",
        "- The order of images and every random draw are our own (Philox, from seed, epoch, image and view):",
        "  distributions are the authors', numbers are not. Mixed pairs do not depend on the number of processes, as",
        "  theirs do; a group of `mix_group` images shares one lambda, as a process's batch does there.",
    )


# Kernels -------------------------------------------------------------------------------------------------------------


def kernels_page() -> str:
    """What each kernel computes, saves and recomputes: the modules' own words."""
    lines = [
        "# Kernels",
        WRITTEN,
        "",
        "What each computes, what it saves for the backward and what it computes again, in the words of its file. On",
        "CUDA tensors they run as Triton, on CPU tensors as eager PyTorch. None has run on a GPU yet; they match",
        "float64 in Triton's interpreter, and as compiled code on a model of sm_80 and sm_90.",
    ]
    for title, names in KERNELS:
        lines += ["", f"## {title}"]
        for name in names.split():
            text = docstring(ROOT / "kernels" / f"{name}.py")
            head, _, body = text.partition("\n\n")
            head = head.replace("\n", " ")
            lines += ["", f"### [{name.removesuffix('_op')}](../kernels/{name}.py)", "", head]
            lines += as_markdown(body)
    return "\n".join(lines)


# Performance ---------------------------------------------------------------------------------------------------------


def performance_page() -> str:
    """performance.md with the roofline's bounds between its markers."""
    page, gpu, batch = (DOCS / "performance.md").read_text(), GPUS["h100"], 512
    rows = ["| model | forward, multiply-adds | training, an image | at most | MFU there |", "|---|---|---|---|---|"]
    for name in ("deit_tiny", "deit_small", "deit_base", "deit3_large", "deit3_huge_patch14_224"):
        speed = 1e6 / sum(part_floors(name, batch, gpu.tflops, gpu.gbps).values())
        macs, flops = forward_macs(name) / 1e9, model_flops(name) / 1e9
        share = 100 * mfu(speed, name, gpu.tflops)
        rows.append(f"| {name} | {macs:.2f} G | {flops:.1f} GFLOP | {speed:,.0f} images/s | {share:.0f} % |")
    before, rest = page.split("<!-- roofline -->")
    after = rest.split("<!-- /roofline -->")[1]
    return "\n".join([f"{before}<!-- roofline -->", "", *rows, "", f"<!-- /roofline -->{after}"])


# API -----------------------------------------------------------------------------------------------------------------


def public_names() -> list[tuple[str, Any]]:
    """Every public name with what it stands for: of `deitfast`, and of `deitfast.kernels`."""
    return [
        (f"{module.__name__}.{name}", getattr(module, name))
        for module in (deitfast, kernels)
        for name in sorted(module.__all__)
    ]


def members(value: Any) -> list[tuple[str, Any]]:
    """The public methods and properties that a class defines itself."""
    return [
        (name, member)
        for name, member in vars(value).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod)))
    ]


def signature(value: Any) -> str:
    """`(x, *, y=1)`, without types: those are in the source, and the docstring says what they mean."""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(value).parameters.values()]
    return str(inspect.Signature([p for p in parameters if p.name != "self"]))


def api_page() -> str:
    """Signature and docstring of every public name."""
    lines = [
        "# API",
        WRITTEN,
        "",
        "Every public name, from its docstring. What is not here may change in any version.",
    ]
    for name, value in public_names():
        if isinstance(value, type):
            lines += ["", f"## {name}", *as_markdown(inspect.getdoc(value) or "")]
            if is_dataclass(value) and value is Recipe:
                lines += ["", "| field | default | |", "|---|---|---|"]
                lines += [f"| `{f.name}` | `{f.default!r}` | {_cell(f.metadata['help'])} |" for f in fields(value)]
            for member, what in members(value):
                text = inspect.getdoc(what.fget if isinstance(what, property) else what) or ""
                lines += ["", f"**{member}**", *as_markdown(text)] if text else []
        else:
            lines += ["", f"## {name}", "", "```text", _wrapped(name.rpartition(".")[2], signature(value)), "```"]
            lines += as_markdown(inspect.getdoc(value) or "")
    return "\n".join(lines)


def _wrapped(name: str, parameters: str) -> str:
    """A call's signature, in lines that a page shows whole."""
    if len(name + parameters) <= 80:
        return name + parameters
    inner = "\n".join(textwrap.wrap(parameters[1:-1], 76, initial_indent="    ", subsequent_indent="    "))
    return f"{name}(\n{inner}\n)"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# The site ------------------------------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """A page as the site shows it: what lies outside docs/ is in the repository."""
    return re.sub(r"\]\(\.\./([^)]+)\)", rf"]({config['repo_url']}/blob/main/\1)", markdown)


# The command ---------------------------------------------------------------------------------------------------------


def pages() -> dict[Path, str]:
    """Every written page with its text."""
    written = {"recipes.md": recipes_page(), "kernels.md": kernels_page(), "api.md": api_page()}
    written["performance.md"] = performance_page()
    return {DOCS / name: text.rstrip() + "\n" for name, text in written.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/pages.py")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 where a page is out of date"
    )
    check = parser.parse_args(argv).check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.name} is out of date; run python docs/pages.py", file=sys.stderr)
        else:
            path.write_text(pages()[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
