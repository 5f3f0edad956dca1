"""Commands that use a model: predict, attention, export, test, models. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deitfast.errors import DeitfastError, say
from deitfast.model.class_names import ORDERS
from deitfast.training.launch import share_cores_politely

if TYPE_CHECKING:
    from deitfast.model.factory import LoadedModel

DEFAULT_MODEL = "deit_small_patch16_224"
_EXIT_PARTLY = 1  # some images could not be read


def add_use(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this module."""
    _add_predict(commands)
    _add_attention(commands)
    _add_export(commands)
    _add_test(commands)
    _add_models(commands)


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="model name (`deitfast models`); empty: told from the weights")
    parser.add_argument(
        "--weights", default=None, help="weight file, run or checkpoint folder, or URL; empty: the published weights"
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights, where a run keeps both")
    parser.add_argument("--image-size", type=int, default=0, help="image side; 0: the model's own")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto [auto]")
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: bf16 on a GPU, else fp32"
    )


def _load(args: argparse.Namespace, **options: Any) -> LoadedModel:
    from deitfast.model.factory import load_model

    name = args.model or (None if args.weights else DEFAULT_MODEL)
    return load_model(name, args.weights, ema=args.ema, image_size=args.image_size or None, **options)


# predict -------------------------------------------------------------------------------------------------------------


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("predict", help="what is in images: files, folders, globs, URLs")
    parser.add_argument("images", nargs="+", metavar="IMG", help="file, folder, glob in quotes, or URL")
    _model_flags(parser)
    _run_flags(parser)
    parser.add_argument("--top", type=int, default=5, help="classes to name [5]")
    parser.add_argument(
        "--batch", type=int, default=0, help="images at once, changes speed alone; 0: 256 on a GPU, 16 on a CPU"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="file,rank,label,class,score")
    parser.add_argument(
        "--show",
        nargs="?",
        const="predictions",
        default=None,
        metavar="DIR",
        help="write annotated images [predictions]",
    )
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace, _: list[str]) -> None:
    if args.top < 1:
        raise DeitfastError(f"--top is {args.top}, must be at least 1")
    share_cores_politely()
    from deitfast.use.images import find_images, open_image
    from deitfast.use.predict import Classifier, annotate

    files = find_images(args.images)
    classifier = Classifier(_load(args), args.device, args.precision, args.batch)
    if not (args.json or args.csv):
        print(f"{len(files)} image(s), {classifier.predictor.how}", file=sys.stderr)
    if args.csv:
        print("file,rank,label,class,score")
    failed, pictures = 0, []
    if args.show:
        Path(args.show).mkdir(parents=True, exist_ok=True)
        pictures = _picture_paths(files, Path(args.show))
    for i, result in classifier.stream(files):
        if isinstance(result, str):
            failed += 1
            print(f"error: {result}", file=sys.stderr)
            continue
        top = classifier.top(result, args.top)
        _print(files[i], top, args)
        if args.show:
            picture = annotate(open_image(files[i]), [(name, score) for _, name, score in top])
            picture.save(pictures[i], quality=90)
    if failed == len(files):
        raise DeitfastError(f"none of the {failed} image(s) could be read")
    if failed:
        sys.exit(_EXIT_PARTLY)


def _print(file: str, top: list[tuple[int, str, float]], args: argparse.Namespace) -> None:
    if args.json:
        classes = [{"label": label, "class": name, "score": round(score, 6)} for label, name, score in top]
        print(json.dumps({"file": file, "top": classes}))
    elif args.csv:
        rows = ((file, rank, label, name, f"{score:.6f}") for rank, (label, name, score) in enumerate(top, 1))
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    else:
        print("\n".join([file, *(f"  {100 * score:6.2f} %  {name}" for _, name, score in top)]))
    sys.stdout.flush()


def _picture_paths(files: list[str], folder: Path) -> list[Path]:
    """Where the picture of each file goes, no two to the same place."""
    taken: dict[Path, None] = {}
    for file in files:
        stem = Path(file.split("?", 1)[0]).stem or "image"
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        taken[next(path for name in names if (path := folder / f"{name}.jpg") not in taken)] = None
    return list(taken)


# attention -----------------------------------------------------------------------------------------------------------


def _add_attention(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("attention", help="draw where a model looks in an image")
    parser.add_argument("image", metavar="IMG", help="file or URL")
    _model_flags(parser)
    parser.add_argument("--out", default="", help="picture to write [attention-IMG.jpg]")
    parser.add_argument(
        "--block", type=int, default=-1, help="block whose heads are drawn, from 0, or from the end [-1]"
    )
    parser.add_argument("--tile", type=int, default=224, help="side of one map, pixels [224]")
    parser.set_defaults(run=_attention)


def _attention(args: argparse.Namespace, _: list[str]) -> None:
    if not 32 <= args.tile <= 2048:
        raise DeitfastError(f"--tile is {args.tile}, must be in [32, 2048]")
    share_cores_politely()
    import torch

    from deitfast.data import normalise
    from deitfast.use.attention_maps import attention_maps, draw_attention
    from deitfast.use.images import centre_crop, open_image

    photo = open_image(args.image)
    loaded = _load(args, fused=False)
    wants = loaded.preprocessing
    image = centre_crop(photo, loaded.model.image_size, wants)
    maps = attention_maps(loaded.model, normalise(torch.tensor(image)[None], wants.mean, wants.std))
    picture = draw_attention(image, maps, loaded.model.num_prefix_tokens, args.block, args.tile)
    out = Path(args.out or f"attention-{Path(args.image).stem}.jpg")
    try:
        picture.save(out, quality=90)
    except (OSError, ValueError) as error:
        raise DeitfastError(f"cannot write {out}: {error}. Give --out NAME.jpg or NAME.png") from error
    print(out)


# export --------------------------------------------------------------------------------------------------------------


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write a model for other libraries and runtimes")
    parser.add_argument("out", metavar="OUT", help="file to write; for hf a new folder")
    _model_flags(parser)
    parser.add_argument(
        "--format", required=True, choices=["timm", "hf", "mmpretrain", "safetensors", "onnx", "exported"],
        help="exported: a torch.export program",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace, _: list[str]) -> None:
    share_cores_politely()
    from deitfast.use.export import export

    if args.model is None and args.weights is None:
        raise DeitfastError("nothing to export. Give --model NAME, --weights FILE, or both")
    print(export(_load(args, fused=False), args.format, args.out, force=args.force))


# test ----------------------------------------------------------------------------------------------------------------


def _add_test(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("test", aliases=["eval"], help="accuracy of weights on a validation set")
    _model_flags(parser)
    parser.add_argument("--data", required=True, help="folder with val/<class>/*, of class folders, or of val shards")
    parser.add_argument(
        "--classes", default=None, choices=ORDERS,
        help="where names of weights and folders tell nothing: labels by ImageNet's synsets, or by the folders, sorted "
        "as text (folders) or as numbers (natural, as timm does)",
    )  # fmt: skip
    parser.add_argument(
        "--eval-crop-ratio", type=float, default=0, help="side share the centre crop keeps; 0: as published (.875 or 1)"
    )
    parser.add_argument("--batch", type=int, default=64, help="images at once a process, changes speed alone [64]")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 on a GPU")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"], help="[auto]")
    parser.add_argument(
        "--decode", default="auto", choices=["auto", "gpu", "cpu"], help="where JPEGs are decoded; auto: where it runs"
    )
    parser.add_argument("--workers", type=int, default=0, help="data threads a process; 0: this machine's cores shared")
    parser.add_argument("--real", default="", metavar="FILE", help="ReaL's real.json: also score by reassessed labels")
    parser.add_argument(
        "--plots", default="", metavar="DIR", help="write confusion.png, calibration.png, per_class.csv"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    parser.set_defaults(run=_test)


def _test(args: argparse.Namespace, _: list[str]) -> None:
    if args.model is None and args.weights is None:
        raise DeitfastError("nothing to test. Give --model NAME, --weights FILE, or both")
    if args.batch < 1:
        raise DeitfastError(f"--batch is {args.batch}, must be at least 1")
    share_cores_politely()
    from deitfast.data import open_dataset
    from deitfast.data.manifest import relabelled
    from deitfast.distributed import start
    from deitfast.model.class_names import imagenet_names, labels_by_name
    from deitfast.use.eval_plots import figure_class, write_plots
    from deitfast.use.evaluate import evaluate_in_detail, real_labels

    if args.plots:
        figure_class()  # refused before anything is evaluated
    world = start(args.device)
    data = world.agree(lambda: open_dataset(args.data, split="val", quiet=world.local_rank > 0))
    found = data.val
    if found is None:
        raise DeitfastError(f"{args.data} has no validation images. Give a folder with val/<class>/*.jpg")
    real = world.agree(lambda: real_labels(Path(args.real), found)) if args.real else None
    loaded = world.agree(lambda: _load(args))
    count = loaded.model.num_classes
    labels, note = world.agree(lambda: labels_by_name(loaded.stored, count, data.classes, args.data, args.classes))
    names = list(loaded.classes)
    if loaded.stored is None and loaded.classes != imagenet_names():  # they have none of their own
        for name, label in labels.items():
            names[label] = name
    val = relabelled(found, names, labels)
    if note and world.is_main:
        say(note)
    crop_ratio = args.eval_crop_ratio or loaded.crop_ratio
    bf16 = world.wants_bf16(args.precision)
    scores, details = evaluate_in_detail(
        loaded.model.to(world.device), val, world,
        crop_ratio=crop_ratio, batch=args.batch, workers=args.workers, bf16=bf16, real=real, decode=args.decode,
        preprocessing=loaded.preprocessing,
    )  # fmt: skip
    if not world.is_main:
        return
    plots = write_plots(details, names, Path(args.plots)) if args.plots else []
    facts: dict[str, Any] = {
        "model": loaded.name, "weights": args.weights or "", "data": args.data, "crop_ratio": crop_ratio,
        **{key: value for key, value in asdict(scores).items() if value is not None},
        "ece": details.ece, "images_per_second": details.images_per_second,
        **({} if details.real_top1 is None else {"real_top1": details.real_top1}),
    }  # fmt: skip
    if args.json:
        per_class = [None if value != value else round(value, 4) for value in details.per_class.tolist()]
        print(json.dumps(facts | {"per_class": per_class}))
        return
    print(f"{loaded.name}: top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % on {scores.images:,} images")
    if scores.top1_head is not None:
        print(f"class head alone {scores.top1_head:.2f} %, distillation head alone {scores.top1_dist:.2f} %")
    if details.real_top1 is not None:
        print(f"top-1 by ReaL labels {details.real_top1:.2f} %")
    ranked = sorted((value, i) for i, value in enumerate(details.per_class.tolist()) if value == value)
    worst = ", ".join(f"{names[i].split(',')[0]} {value:.0f} %" for value, i in ranked[:5])
    print(f"crop ratio {crop_ratio:g}, calibration error {details.ece:.3f}, {details.images_per_second:.0f} images/s")
    print(f"hardest classes: {worst}")
    for path in plots:
        print(path)


# models --------------------------------------------------------------------------------------------------------------


def _add_models(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="list the models")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace, _: list[str]) -> None:
    from deitfast.model.zoo import OTHER_WEIGHTS, VARIANTS

    everything = dict(sorted(VARIANTS.items())) | OTHER_WEIGHTS
    if args.json:
        listed = {
            name: asdict(v) | {"parameters": v.parameters(), "multiply_adds": v.multiply_adds()}
            for name, v in everything.items()
        }
        print(json.dumps(listed, indent=1))
        return
    print(f"{'model':33} {'px':>4} {'params M':>8} {'MACs G':>7} {'top-1':>6} {'top-5':>6} {'ours':>6}  crop  source")
    for name, v in everything.items():
        top1, top5, ours = (f"{x:.2f}".removesuffix("0") if x else "-" for x in (v.top1, v.top5, v.measured_top1))
        source = f"{v.crop_ratio:<5g} {v.source}" if v.source else "-     no published weights"
        print(
            f"{name:33} {v.image_size:4d} {v.parameters() / 1e6:8.2f} {v.multiply_adds() / 1e9:7.2f} "
            f"{top1:>6} {top5:>6} {ours:>6}  {source}"
        )
    print("top-1, top-5: published, ImageNet-1k, percent; ours: measured with this code; --json adds the weights' URLs")
