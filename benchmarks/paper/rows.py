"""The rows of the table that the DeiT paper has, as runs, and the paper's claims as differences between their scores.

A run is a recipe's base with a few settings changed. What the paper removes one at a time is a `Factor`: the base has
it or not, the row has the other, and either way the claim is about the run with it against the run without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deitfast.recipe import Recipe

BASE = "base"
CONVNET, EQUAL_CONVNET, TRANSFORMER = "convnet", "convnet of the transformer's accuracy", "transformer"
TEACHERS = (CONVNET, EQUAL_CONVNET, TRANSFORMER)


@dataclass(frozen=True)
class Factor:
    """An ingredient of the recipe: the settings with it and without it."""

    name: str
    claim: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]

    def is_on(self, base: Recipe) -> bool:
        """Whether the base has it: whether it differs from the settings without it."""
        return any(getattr(base, name) != value for name, value in self.off.items())


FACTORS = (
    Factor("mixup and cutmix", "mixup and cutmix help", {"mixup": 0.8, "cutmix": 1.0}, {"mixup": 0.0, "cutmix": 0.0}),
    Factor("repeated augmentation", "repeated augmentation helps", {"repeats": 3}, {"repeats": 1}),
    Factor("RandAugment", "RandAugment helps", {"rand_augment": "rand-m9-mstd0.5-inc1"}, {"rand_augment": "none"}),
    Factor("random erasing", "random erasing helps", {"erase": 0.25}, {"erase": 0.0}),
    Factor("drop-path", "drop-path helps", {"drop_path": 0.1}, {"drop_path": 0.0}),
    Factor("label smoothing", "label smoothing helps", {"smoothing": 0.1}, {"smoothing": 0.0}),
    Factor(
        "AdamW", "AdamW beats SGD", {"optimizer": "adamw"},
        {"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: the base with `changes`.

    teacher: of TEACHERS, or none. distilled: a model with the second token. start: the run whose best weights it starts
    from. longer: times the base's epochs. share: of the training images one in so many, seen as much oftener. by_timm:
    by `timm_loop`. processes: under the launcher with so many, where it is not 1, which sum gradients in the dtype
    `wire`.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""
    distilled: bool = False
    start: str = ""
    longer: int = 1
    share: int = 1
    by_timm: bool = False
    processes: int = 1
    wire: str = "fp32"


@dataclass(frozen=True)
class Score:
    """A number of a run: of raw or ema weights, and of both heads' mean (`top1`), or of one head alone."""

    run: str
    weights: str = "ema"
    head: str = "top1"

    def __str__(self) -> str:
        which = {"top1": "", "top1_head": ", class head", "top1_dist": ", distillation head"}[self.head]
        return f"{self.run}, {self.weights}{which}"


@dataclass(frozen=True)
class Claim:
    """`better` is said to be above `worse`; where `equal`, to be no different from it."""

    text: str
    better: Score
    worse: Score
    equal: bool = False


def runs(base: Recipe) -> list[Run]:
    """Every training of the table, those first that say most."""
    hard: dict[str, Any] = {"distillation": "hard"}
    flipped = {f.name: Run(_flipped(f, base), f.off if f.is_on(base) else f.on) for f in FACTORS}
    mixing = flipped.pop("mixup and cutmix")
    halved = {"micro_batch": min(base.micro_batch or base.batch, base.batch // 2)}
    return [
        Run(BASE),
        mixing,
        Run("hard, token", hard, CONVNET, distilled=True),
        Run("hard, class token", hard, CONVNET),
        Run("soft, class token", {"distillation": "soft", "distillation_alpha": 0.1, "distillation_tau": 3.0}, CONVNET),
        Run("second token, no teacher", distilled=True),
        Run("hard, token, transformer", hard, TRANSFORMER, distilled=True),
        Run("hard, token, equal convnet", hard, EQUAL_CONVNET, distilled=True),
        Run("half the images", share=2),
        Run(f"half the images, {mixing.name}", mixing.changes, share=2),
        *flipped.values(),
        Run("timm loop", _TIMM_HAS, by_timm=True),
        *([Run("timm loop's settings", _TIMM_HAS)] if _changed(base, _TIMM_HAS) else []),
        Run("plain loop", {"engine": "plain"}),
        Run("bf16", {"precision": "bf16"}),
        Run("drop-path as a subset", {"drop_path": 0.1, "drop_path_form": "subset"}),
        Run("two processes", halved, processes=2),
        Run("two processes, bf16 sums", halved, processes=2, wire="bf16"),
        Run("twice as long", longer=2),
        Run("hard, token, twice as long", hard, CONVNET, distilled=True, longer=2),
        Run("hard, class token, twice as long", hard, CONVNET, longer=2),
        Run("at twice the size", {"image_size": 2 * _image_size(base), **_FINE_TUNING}, start=BASE),
    ]


_TIMM_HAS = {"repeats": 1}
"""What timm's loop is run with: timm repeats augmentation over processes alone."""
_FINE_TUNING = {"lr": 1e-4, "min_lr": 1e-4, "weight_decay": 1e-8, "warmup_epochs": 0.0, "drop_path": 0.0}


def claims(base: Recipe) -> list[Claim]:
    """What the paper says, and what this engine says of its own choices, in terms of the runs above."""
    found = [
        Claim(f"the average of the weights (EMA) helps: {run}", Score(run), Score(run, "raw"))
        for run in (BASE, "hard, token", "hard, class token")
    ]
    for factor in FACTORS:
        pair = Score(BASE), Score(_flipped(factor, base))
        found.append(Claim(factor.claim, *(pair if factor.is_on(base) else pair[::-1])))
    drop_path = next(f for f in FACTORS if f.name == "drop-path")
    per_image = BASE if drop_path.is_on(base) else _flipped(drop_path, base)
    mixing = FACTORS[0]
    fewer = Score("half the images"), Score(f"half the images, {_flipped(mixing, base)}")
    token, alone = Score("hard, token"), Score("hard, class token")
    return [
        *found,
        Claim(f"{mixing.claim} where images are fewer", *(fewer if mixing.is_on(base) else fewer[::-1])),
        Claim("distillation from a convnet helps", token, Score(BASE)),
        Claim("hard labels beat soft ones", alone, Score("soft, class token")),
        Claim("the token helps over hard labels on the class token alone", token, alone),
        Claim("the token needs the teacher", token, Score("second token, no teacher")),
        Claim("both heads beat the class head", token, Score("hard, token", head="top1_head")),
        Claim("both heads beat the distillation head", token, Score("hard, token", head="top1_dist")),
        Claim(
            "a convnet teaches better than a transformer of equal accuracy", Score("hard, token, equal convnet"),
            Score("hard, token, transformer"),
        ),
        Claim("longer training helps", Score("twice as long"), Score(BASE)),
        Claim("longer training helps with distillation", Score("hard, token, twice as long"), token),
        Claim(
            "distillation helps where training is longer", Score("hard, token, twice as long"), Score("twice as long")
        ),
        Claim(
            "the token helps over hard labels on the class token alone where training is longer",
            Score("hard, token, twice as long"), Score("hard, class token, twice as long"),
        ),
        Claim("fine-tuning at a larger resolution helps", Score("at twice the size"), Score(BASE)),
        Claim(
            "the engine learns like a loop of timm's parts",
            Score("timm loop's settings" if _changed(base, _TIMM_HAS) else BASE), Score("timm loop"), equal=True,
        ),
        Claim("the flat engine learns like the plain loop", Score(BASE), Score("plain loop"), equal=True),
        Claim("bf16 learns like fp32", Score(BASE), Score("bf16"), equal=True),
        Claim(
            "drop-path as a subset learns like drop-path per image", Score("drop-path as a subset"), Score(per_image),
            equal=True,
        ),
        Claim("two processes that share the update learn like one", Score("two processes"), Score(BASE), equal=True),
        Claim(
            "gradients summed over processes in bf16 learn like fp32", Score("two processes, bf16 sums"),
            Score("two processes"), equal=True,
        ),
    ]  # fmt: skip


def _flipped(factor: Factor, base: Recipe) -> str:
    return f"{'without' if factor.is_on(base) else 'with'} {factor.name}"


def _changed(base: Recipe, settings: Mapping[str, Any]) -> bool:
    return any(getattr(base, name) != value for name, value in settings.items())


def _image_size(base: Recipe) -> int:
    return base.image_size or 32
