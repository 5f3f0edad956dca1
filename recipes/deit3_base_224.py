"""DeiT III-B fine-tuned at 224 px, 20 epochs on ImageNet-1k: the second stage after deit3_base.py.

    torchrun --nproc-per-node GPUS recipes/deit3_base_224.py --data IMAGENET [--init WEIGHTS]

Expected top-1: 83.8 % (README_revenge.md of facebookresearch/deit, whose command this follows).
Drop-path stays on, unlike in the first DeiT's fine-tuning. Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import Recipe, run

RECIPE = Recipe(
    model="deit3_base_patch16_224",
    init="runs/deit3_base/best",
    # Optimisation
    optimizer="adamw",
    epochs=20,
    batch=512,
    lr=1e-5,  # final, and stays there after the warm-up: min_lr is the same
    min_lr=1e-5,
    warmup_lr=1e-6,
    warmup_epochs=5,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.999,
    adam_eps=1e-8,
    clip_norm=0.0,
    ema_decay=0.99996,
    # Regularisation
    drop_path=0.2,
    drop_path_schedule="constant",
    layer_scale=1e-4,
    loss="ce",
    smoothing=0.1,
    # Augmentation
    repeats=1,
    crop_min=0.08,
    crop_max=1.0,
    flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.0,
    mixup=0.8,
    cutmix=1.0,
    mix_probability=1.0,
    mix_switch=0.5,
    mix_group=64,  # a process's batch in the authors' command
    erase=0.0,
    # Evaluation
    eval_crop_ratio=1.0,
)

if __name__ == "__main__":
    run(RECIPE, name="deit3_base_224", description=__doc__)
