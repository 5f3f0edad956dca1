"""What flags of other trainers are called here: of facebookresearch/deit, of timm's scripts, of mmpretrain's tools."""

from __future__ import annotations

from collections.abc import Container

# Their flag -> ours; of several, the first that the command has.
_RENAMED = {
    "data-path": "--data", "data-dir": "--data", "dataset": "--data", "data-set": "--data", "data-root": "--data",
    "finetune": "--init --weights", "initial-checkpoint": "--init --weights", "load-from": "--init --weights",
    "pretrained": "--init --weights", "checkpoint": "--weights --init", "ckpt": "--weights --init",
    "model-path": "--weights --init", "init": "--weights",
    "output-dir": "--out", "output": "--out", "work-dir": "--out", "experiment": "--out", "save-dir": "--out",
    "batch-size": "--batch", "b": "--batch", "train-batch-size": "--batch", "accum-iter": "--micro-batch",
    "grad-accum-steps": "--micro-batch", "gradient-accumulation-steps": "--micro-batch", "bs": "--batch",
    "input-size": "--image-size", "img-size": "--image-size", "imgsz": "--image-size", "resolution": "--image-size",
    "aa": "--rand-augment", "auto-augment": "--rand-augment",
    "opt": "--optimizer", "optim": "--optimizer", "opt-eps": "--adam-eps", "opt-betas": "--beta1",
    "momentum": "--beta1", "clip-grad": "--clip-norm", "max-grad-norm": "--clip-norm", "wd": "--weight-decay",
    "blr": "--lr", "base-lr": "--lr", "learning-rate": "--lr", "auto-scale-lr": "--scale-lr",
    "warmup-steps": "--warmup-epochs", "num-epochs": "--epochs", "max-epochs": "--epochs",
    "reprob": "--erase", "random-erase": "--erase", "aug-repeats": "--repeats", "repeated-aug": "--repeats",
    "no-repeated-aug": "--repeats", "mixup-prob": "--mix-probability", "mixup-switch-prob": "--mix-switch",
    "hflip": "--flip", "scale": "--crop-min", "label-smoothing": "--smoothing", "bce-loss": "--loss",
    "crop-pct": "--eval-crop-ratio", "model-ema": "--ema-decay", "model-ema-decay": "--ema-decay", "use-ema": "--ema",
    "teacher-model": "--teacher", "teacher-path": "--teacher", "distillation-type": "--distillation",
    "class-weight": "--class-weights", "class-balance": "--class-weights", "balance": "--class-weights",
    "balanced": "--class-weights", "sampler": "--class-weights", "weighted-sampler": "--class-weights",
    "balanced-sampler": "--class-weights", "cls-weights": "--class-weights",
    "grad-checkpointing": "--recompute", "use-checkpoint": "--recompute", "amp": "--precision",
    "amp-dtype": "--precision", "fp16": "--precision", "bf16": "--precision", "no-amp": "--precision",
    "torchcompile": "--fused", "num-workers": "--workers", "j": "--workers", "gpus": "--device", "gpu": "--device",
    "log-interval": "--log-every", "print-freq": "--log-every", "checkpoint-hist": "--keep-every",
    "save-freq": "--keep-every", "topk": "--top", "threshold": "--top", "label-file": "--classes",
    "class-map": "--classes", "results-file": "--json", "opset": "--format", "arch": "--model", "a": "--model",
    "model-name": "--model", "random-seed": "--seed", "head-init-scale": "--reset-head", "report-to": "--track",
}  # fmt: skip

_RESUMES = "No flag is needed: the same command resumes, by its --out"
_FROM_DATA = "No flag is needed: the number of classes comes from the data"
_TORCHRUN = "No flag is needed: `deitfast train` and torchrun start the processes"
_TOLD = {  # of a recipe's flags
    "threeaugment": "Here it is --rand-augment three",
    "resume": _RESUMES, "start-epoch": _RESUMES, "auto-resume": _RESUMES, "no-resume-opt": _RESUMES,
    "nb-classes": _FROM_DATA, "num-classes": _FROM_DATA, "n-classes": _FROM_DATA, "classes": _FROM_DATA,
    "eval": "The command for it is `deitfast test --weights W --data DIR`",
    "evaluate": "The command for it is `deitfast test --weights W --data DIR`",
    "test-only": "The command for it is `deitfast test --weights W --data DIR`",
    "validate": "The command for it is `deitfast test --weights W --data DIR`",
    "dist-eval": "No flag is needed: every process evaluates its share",
    "unscale-lr": "No flag is needed: --lr is final unless --scale-lr is given",
    "sched": "No flag is needed: the schedule is the cosine of --lr, --min-lr, --warmup-epochs and --epochs",
    "lr-scheduler": "No flag is needed: the schedule is the cosine of --lr, --min-lr, --warmup-epochs and --epochs",
    "cooldown-epochs": "There is none: the cosine ends with the last of --epochs",
    "decay-epochs": "There is none: the cosine ends with the last of --epochs",
    "drop": "There is no dropout here, as in the paper. --drop-path drops whole branches",
    "train-interpolation": "No flag is needed: training resizes bicubically, as the paper does",
    "interpolation": "No flag is needed: it comes with the weights",
    "mean": "No flag is needed: it comes with the weights",
    "std": "No flag is needed: it comes with the weights",
    "inat-category": "No flag is needed: the classes are the folders of --data",
    "remode": "No flag is needed: erased pixels are noise, as in the paper",
    "recount": "No flag is needed: one rectangle is erased, as in the paper",
    "pin-mem": "No flag is needed: memory is pinned where there is a GPU",
    "channels-last": "No flag is needed: the patches are laid out by the step's first kernel",
    "sync-bn": "No flag is needed: the model has no batch norm",
    "dist-bn": "No flag is needed: the model has no batch norm",
    "launcher": _TORCHRUN, "world-size": _TORCHRUN, "dist-url": _TORCHRUN, "local-rank": _TORCHRUN,
    "distributed": _TORCHRUN, "nproc-per-node": "torchrun has it; of `deitfast train` it is --processes",
    "log-wandb": "Here it is --track wandb",
    "cfg-options": "Every setting is a flag of its own; --help lists them",
    "pretrained-weights": "Give --weights FILE",
    "cosub": "Cosub is not built here",
    "attn-only": "Training the attention alone is not built here",
}  # fmt: skip


def known_elsewhere(name: str, flags: Container[str]) -> str:
    """A sentence about a flag of another trainer, with a space before it: what it is in a command with these flags.

    name: as typed. Empty for a flag that is not known, or has no counterpart in the command.
    """
    word = name.lstrip("-").replace("_", "-").lower()
    if not name.startswith("-"):
        return ""
    ours = f"--{word}"
    if ours != name and ours in flags:  # --rand_augment
        return f" Here it is {ours}"
    for choice in _RENAMED.get(word, "").split():
        if choice in flags:
            return f" Here it is {choice}"
    return f" {_TOLD[word]}" if word in _TOLD and "--epochs" in flags else ""
