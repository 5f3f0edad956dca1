"""Recipe: every setting of a training run in one flat frozen dataclass, and the flags generated from its fields.

The defaults are the DeiT paper's for 300 epochs on ImageNet-1k (Touvron et al. 2021, arXiv 2012.12877, table 9, and
main.py of facebookresearch/deit).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from deitfast.errors import DeitfastError

PAPER_TRAIN_IMAGES = 1_281_167
RAND_AUGMENT = re.compile(r"rand-m(\d+(?:\.\d+)?)(?:-mstd(\d+(?:\.\d+)?))?(-inc1)?")
"""timm's notation: magnitude, its standard deviation, and whether effects grow with the magnitude."""


def _paper(default: Any, help: str) -> Any:
    """A hyper-parameter: changing it changes the result, so a value other than the paper's is printed in words."""
    return field(default=default, metadata={"help": help, "paper": default})


def _task(default: Any, help: str) -> Any:
    """What is trained on what: part of the run's identity, but not a deviation from the paper."""
    return field(default=default, metadata={"help": help})


def _machine(default: Any, help: str) -> Any:
    """How this machine does the work; may change when a run is resumed, because the result does not depend on it."""
    return field(default=default, metadata={"help": help, "machine": True})


@dataclass(frozen=True)
class Recipe:
    """One experiment. Lengths in pixels, durations in epochs unless the name says otherwise."""

    # What
    model: str = _task("deit_base_patch16_224", "model name (`deitfast models` lists them)")
    data: str = _task("", "folder with train/<class>/* and val/<class>/*, or tar shards; or `digits`, the packaged set")
    init: str = _task("", "weight file to start from (.safetensors or .pth); empty: fresh weights")
    reset_head: bool = _task(False, "start a new head at zero instead of the weight file's")
    image_size: int = _task(0, "image side; 0: the model's own. Position embeddings are interpolated to it")
    seed: int = _task(0, "seed of weights, order and every random draw")
    # Optimisation
    optimizer: str = _paper("adamw", "adamw, lamb (DeiT III) or sgd (momentum .9, Nesterov)")
    epochs: int = _paper(300, "passes over the data")
    batch: int = _paper(
        1024, "images of an update, over all processes: part of the result; --micro-batch: images at once"
    )
    lr: float = _paper(1e-3, "peak learning rate, final; --scale-lr computes the one that belongs to another --batch")
    min_lr: float = _paper(1e-5, "learning rate at the end of the cosine")
    warmup_lr: float = _paper(1e-6, "learning rate of the first step")
    warmup_epochs: float = _paper(5.0, "epochs of linear warm-up, inside the total")
    weight_decay: float = _paper(0.05, "weight decay; biases, norms, tokens and position embeddings have none")
    beta1: float = _paper(0.9, "beta 1 of AdamW and LAMB, momentum of SGD")
    beta2: float = _paper(0.999, "beta 2 of AdamW and LAMB")
    adam_eps: float = _paper(1e-8, "epsilon of AdamW and LAMB")
    clip_norm: float = _paper(0.0, "largest gradient norm; 0: no clipping")
    ema_decay: float = _paper(0.99996, "decay of the averaged weights, a step; 0: none")
    deit_compat: bool = _task(False, "quirks of the authors' code: its staircase schedule, a decayed dist_token")
    # Regularisation
    drop_path: float = _paper(0.1, "probability of dropping a residual branch (of the last block where it is linear)")
    drop_path_schedule: str = _paper("linear", "linear: rises from 0 over depth; constant: the same in every block")
    drop_path_form: str = _paper(
        "bernoulli", "bernoulli, or subset: a fixed share of each mix group, drawn at random, whose compute is skipped"
    )
    layer_scale: float = _paper(0.0, "initial LayerScale; 0: the model's own (DeiT has none, DeiT III 1e-4)")
    loss: str = _paper("ce", "ce (soft cross-entropy) or bce (binary, every class present in a mixture is 1: DeiT III)")
    smoothing: float = _paper(0.1, "label smoothing")
    class_weights: str = _paper(
        "none",
        "balanced: rare classes weigh more in the loss, images / (classes x images of the class); sampled: an epoch "
        "shows every class equally often; none",
    )
    # Distillation
    distillation: str = _task("none", "none, hard (cross-entropy with the teacher's argmax) or soft (KL divergence)")
    teacher: str = _task("", "teacher: our, timm's or Hugging Face's model name, an exported file, or NAME:WEIGHTS")
    distillation_alpha: float = _task(0.5, "share of the distillation loss")
    distillation_tau: float = _task(1.0, "temperature of soft distillation")
    # Augmentation
    repeats: int = _paper(3, "copies of an image in a batch (repeated augmentation); 1: none")
    crop_min: float = _paper(0.08, "smallest area share of the random resized crop")
    crop_max: float = _paper(1.0, "largest area share of the random resized crop")
    flip: float = _paper(0.5, "probability of a horizontal flip")
    rand_augment: str = _paper("rand-m9-mstd0.5-inc1", "RandAugment in timm's notation, three (3-Augment), or none")
    color_jitter: float = _paper(0.0, "strength of colour jitter (brightness, contrast, saturation); 0: none")
    mixup: float = _paper(0.8, "mixup's Beta parameter; 0: none")
    cutmix: float = _paper(1.0, "cutmix's Beta parameter; 0: none")
    mix_probability: float = _paper(1.0, "probability that a group is mixed at all")
    mix_switch: float = _paper(0.5, "probability of cutmix where both are on")
    mix_group: int = _paper(128, "images that share one lambda (a process's batch in the paper: 1024 over 8 GPUs)")
    erase: float = _paper(0.25, "probability of random erasing")
    # Evaluation
    eval_crop_ratio: float = _paper(0.875, "share of the resized image's side that the centre crop keeps")
    eval_every: int = _machine(1, "epochs between evaluations; the last epoch is always evaluated")
    # This machine
    out: str = _machine("", "run folder; empty: runs/<recipe>. The same folder resumes")
    micro_batch: int = _machine(0, "images a process runs at once; 0: the largest that fits in memory (32 on CPU)")
    engine: str = _machine(
        "auto", "graph (one CUDA graph a step), flat (the same uncaptured), plain (DDP, the reference), or auto"
    )
    recompute: bool = _machine(False, "compute the MLPs' hidden layers again in the backward instead of keeping them")
    precision: str = _task("auto", "bf16 (autocast, fp32 master weights) or fp32; auto: bf16 on a GPU, fp32 on CPU")
    fused: str = _machine(
        "auto",
        "auto: Triton kernels on a GPU where they prove right and fast there; yes: or fail; no; or the env.json of a "
        "run whose choices are taken",
    )
    device: str = _machine("auto", "cuda, cpu, or auto")
    workers: int = _machine(0, "data threads a process; 0: this machine's cores shared by its processes")
    decode: str = _machine("auto", "where JPEGs are decoded: gpu, cpu, or auto (the faster in a short measurement)")
    bad_limit: float = _machine(0.001, "share of images that may turn out unreadable in the run before it stops")
    log_every: int = _machine(
        0, "steps between lines of metrics.jsonl (no other step waits for the GPU); 0: 50, on CPU 1"
    )
    save_minutes: float = _machine(10.0, "minutes between checkpoints inside an epoch; each epoch ends with one anyway")
    keep_every: int = _machine(0, "epochs of whose every multiple the checkpoint stays for good; 0: newest two")
    patience: float = _machine(
        300.0, "seconds without a step after which a process ends, so that the launcher starts the run again"
    )
    allow_changes: bool = _machine(False, "resume although the recipe differs from the run folder's")

    def check(self) -> None:
        """Raise DeitfastError for the first value that no run could use, naming flag, value and valid range."""
        if not self.data:
            raise DeitfastError(
                "no data. Give --data FOLDER (train/<class>/*.jpg and val/<class>/*.jpg, or tar shards), "
                "or --data digits for the packaged set"
            )
        below_one = 1 - 1e-9
        ranges: dict[tuple[float, float], str] = {
            (1, math.inf): "epochs batch eval_every patience",
            (2, math.inf): "mix_group",
            (0, math.inf): "lr min_lr warmup_lr warmup_epochs weight_decay clip_norm layer_scale mixup cutmix "
            "micro_batch log_every save_minutes color_jitter keep_every",
            (0, 1): "flip mix_probability mix_switch erase distillation_alpha bad_limit",
            (0, below_one): "beta1 beta2 ema_decay drop_path smoothing",
            (1e-30, 1): "adam_eps",
            (1e-3, 1e3): "distillation_tau",
            (1e-4, 1): "crop_min",
            (self.crop_min, 1): "crop_max",
            (0.01, 1): "eval_crop_ratio",
            (1, 16): "repeats",
            (0, 1024): "workers",
            (0, 4096): "image_size",
            (0, 2**63 - 1): "seed",
        }
        for (low, high), names in ranges.items():
            for name in names.split():
                value = getattr(self, name)
                if not low <= value <= high:
                    raise DeitfastError(f"{flag(name)} is {value}, must be in [{low:g}, {high:g}]")
        choices = {
            "precision": ("auto", "bf16", "fp32"),
            "fused": ("auto", "yes", "no", "the env.json of a run") if not self.choices else (self.fused,),
            "device": ("auto", "cuda", "cpu"),
            "decode": ("auto", "gpu", "cpu"),
            "engine": ("auto", "graph", "flat", "plain"),
            "optimizer": ("adamw", "lamb", "sgd"),
            "loss": ("ce", "bce"),
            "drop_path_schedule": ("linear", "constant"),
            "drop_path_form": ("bernoulli", "subset"),
            "class_weights": ("none", "balanced", "sampled"),
            "distillation": ("none", "hard", "soft"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise DeitfastError(f"{flag(name)} is {getattr(self, name)!r}, must be one of {', '.join(valid)}")
        if self.rand_augment not in ("none", "three") and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise DeitfastError(
                f"--rand-augment is {self.rand_augment!r}, must be none, three, or timm's notation such as "
                "rand-m9-mstd0.5-inc1"
            )
        if (self.distillation == "none") != (not self.teacher):
            given, missing = ("--teacher", "--distillation hard") if self.teacher else ("--distillation", "--teacher")
            raise DeitfastError(f"{given} needs {missing}: the one does nothing without the other")
        if self.optimizer == "lamb" and self.engine == "plain":
            raise DeitfastError("--engine plain has no LAMB: PyTorch ships none. Use --engine flat")
        self.refuse_odd(batch=self.batch, micro_batch=self.micro_batch, mix_group=self.mix_group)
        if self.warmup_epochs > self.epochs:
            raise DeitfastError(f"--warmup-epochs {self.warmup_epochs:g} exceeds --epochs {self.epochs}. Lower it")
        if self.loss == "bce" and self.smoothing:
            raise DeitfastError(
                f"--smoothing is {self.smoothing:g}, but --loss bce makes every class with a share a full target, and "
                "smoothing gives all classes a share. Give --smoothing 0"
            )
        if self.loss == "bce" and self.class_weights == "balanced":
            raise DeitfastError(
                "--class-weights balanced weighs the cross-entropy, and --loss is bce. Give --loss ce, or "
                "--class-weights sampled"
            )
        if self.reset_head and not self.init:
            raise DeitfastError("--reset-head needs --init WEIGHTS: fresh weights have a fresh head")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0

    @property
    def unit(self) -> int:
        """Images that stay together in a micro-batch: the two of a pair, where pairs are mixed."""
        return 2 if self.mixes else 1

    @property
    def fuses(self) -> bool | None:
        """`fused` as `create_model` takes it."""
        return {"yes": True, "no": False}.get(self.fused)

    @property
    def choices(self) -> str:
        """The file of choices that `fused` names; empty where it names none."""
        return self.fused if self.fused.endswith(".json") else ""

    def refuse_odd(self, **counts: int) -> None:
        """Raise DeitfastError for the first of these numbers of images, by setting, that cuts through a mixed pair."""
        for name, count in counts.items():
            if count % self.unit:
                raise DeitfastError(
                    f"{flag(name)} is {count}, odd, but mixup and cutmix mix pairs. Make it even, or give --mixup 0 "
                    "--cutmix 0"
                )

    def ruled_lr(self, batch: int) -> float:
        """The learning rate that belongs to another batch by the rule of this recipe's optimiser.

        Linear in the batch for AdamW (the DeiT paper: 5e-4 x batch / 512) and SGD (Goyal et al. 2017, arXiv
        1706.02677); with its square root for LAMB (You et al. 2020, arXiv 1904.00962).
        """
        growth = batch / self.batch
        return self.lr * (math.sqrt(growth) if self.optimizer == "lamb" else growth)

    def scaled(self, batch: int) -> Recipe:
        """This recipe at another batch, with the learning rate that belongs to it: `ruled_lr`."""
        return replace(self, batch=batch, lr=self.ruled_lr(batch))

    def deviations(self, train_images: int | None = None, stated: Recipe | None = None) -> list[str]:
        """Each way in which this run is not the DeiT paper's or, where `stated` is given, not that recipe file's.

        A learning rate that follows the batch by the rule is none.
        """
        found = []
        base = stated or Recipe()
        by_rule = base.ruled_lr(self.batch)
        tolerance = 0.02 if self.batch != base.batch else 0.0  # 6.25e-5 may be typed as 6.3e-5
        follows = math.isclose(self.lr, by_rule, rel_tol=tolerance)
        for f in fields(self):
            if "paper" not in f.metadata or (f.name == "lr" and follows):
                continue
            paper = f.metadata["paper"]
            expected, whose = (paper, "the paper's") if stated is None else (getattr(stated, f.name), "the recipe's")
            if getattr(self, f.name) != expected:
                whose = "the paper's" if expected == paper else whose
                found.append(f"{f.name.replace('_', ' ')} is {getattr(self, f.name)}, {whose} is {expected}")
        if self.batch != base.batch and not follows:
            found.append(
                f"by the rule the learning rate of batch {self.batch} is {by_rule:.4g}, not {self.lr:g}. --scale-lr "
                "follows it"
            )
        own_data = stated is not None and (stated.data or stated.init)  # not ImageNet, or not its first stage
        if train_images not in (None, PAPER_TRAIN_IMAGES) and not own_data:
            found.append(f"the data has {train_images:,} training images, the paper's {PAPER_TRAIN_IMAGES:,}")
        if self.init and (stated is None or self.init != stated.init):
            other = stated.init if stated else ""
            found.append(
                f"starts from {self.init}, {f'the recipe from {other}' if other else 'the paper from fresh weights'}"
            )
        return found

    def changes(self, other: dict[str, Any]) -> list[str]:
        """Where a recorded recipe (a dict of its fields) differs in what determines the result."""
        return [
            f"{flag(f.name)} is {getattr(self, f.name)!r}, was {other.get(f.name)!r}"
            for f in fields(self)
            if not f.metadata.get("machine") and getattr(self, f.name) != other.get(f.name, f.default)
        ]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
