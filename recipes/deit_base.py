"""DeiT-B, 300 epochs on ImageNet-1k: the DeiT paper's recipe.

    torchrun --nproc-per-node GPUS recipes/deit_base.py --data IMAGENET

Expected top-1: 81.8 % (README_deit.md of facebookresearch/deit; raw weights, crop ratio .875).
Time on 1 and on 8 H100: not yet measured. Not yet run.

Any setting below is a flag; `--help` lists them. The global batch is 1024 on any number of GPUs: accumulation follows
from it and from --micro-batch. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import Recipe, run

RECIPE = Recipe(
    model="deit_base_patch16_224",
    # Optimisation
    optimizer="adamw",
    epochs=300,
    batch=1024,
    lr=1e-3,  # 5e-4 x 1024 / 512
    min_lr=1e-5,
    warmup_lr=1e-6,
    warmup_epochs=5,
    weight_decay=0.05,
    beta1=0.9,
    beta2=0.999,
    adam_eps=1e-8,
    clip_norm=0.0,
    ema_decay=0.99996,
    # Regularisation
    drop_path=0.1,
    drop_path_schedule="linear",
    loss="ce",
    smoothing=0.1,
    # Augmentation
    repeats=3,
    crop_min=0.08,
    crop_max=1.0,
    flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.0,  # the original's .3 is ignored beside RandAugment
    mixup=0.8,
    cutmix=1.0,
    mix_probability=1.0,
    mix_switch=0.5,
    mix_group=128,
    erase=0.25,
    # Evaluation
    eval_crop_ratio=0.875,
)

if __name__ == "__main__":
    run(RECIPE, name="deit_base", description=__doc__)
