"""DeiT III-B, 800 epochs on ImageNet-1k at 192 px (Touvron et al. 2022, arXiv 2204.07118): the first of two stages.

    torchrun --nproc-per-node GPUS recipes/deit3_base.py --data IMAGENET
    torchrun --nproc-per-node GPUS recipes/deit3_base_224.py --data IMAGENET

Expected top-1 after the second stage: 83.8 % (README_revenge.md of facebookresearch/deit); none is
published of this one.
Time on 1 and on 8 H100: not yet measured. Not yet run.

The settings are those of the authors' command (README_revenge.md at commit b001f95; its first version lacks the test
crop of 1.0). Gradients are clipped at norm 1, which the command does not say: it is the default of its optimiser,
apex's FusedLAMB (max_grad_norm in apex/optimizers/fused_lamb.py); timm's `fusedlamb` hands it rate, decay and epsilon.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import Recipe, run

RECIPE = Recipe(
    model="deit3_base_patch16_224",
    image_size=192,
    # Optimisation
    optimizer="lamb",
    epochs=800,
    batch=2048,
    lr=3e-3,  # final: not scaled with the batch
    min_lr=1e-5,
    warmup_lr=1e-6,
    warmup_epochs=5,
    weight_decay=0.05,
    beta1=0.9,
    beta2=0.999,
    adam_eps=1e-8,
    clip_norm=1.0,
    ema_decay=0.99996,
    # Regularisation
    drop_path=0.2,
    drop_path_schedule="constant",
    layer_scale=1e-4,
    loss="bce",
    smoothing=0.0,
    # Augmentation
    repeats=3,
    crop_min=0.08,
    crop_max=1.0,
    flip=0.5,
    rand_augment="three",
    color_jitter=0.3,
    mixup=0.8,
    cutmix=1.0,
    mix_probability=1.0,
    mix_switch=0.5,
    mix_group=256,  # a process's batch in the authors' command
    erase=0.0,
    # Evaluation
    eval_crop_ratio=1.0,
)

if __name__ == "__main__":
    run(RECIPE, name="deit3_base", description=__doc__)
