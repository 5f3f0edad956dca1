"""ViT-S/16, 90 epochs on ImageNet-1k with big_vision's settings: the cheapest run that proves an engine.

    torchrun --nproc-per-node GPUS recipes/vit_small_90.py --data IMAGENET

Expected top-1 of the authors' model: 76.5 % (big_vision/configs/vit_s16_i1k.py of google-research/big_vision, after
Beyer et al. 2022, arXiv 2205.01580). Of this one nothing is published. It is DeiT-S, which has a class token and
learned positions where theirs has the mean over all tokens, fixed sine and cosine positions and a hidden layer in its
head. Their warm-up comes before the cosine, here it is its beginning; their RandAugment always applies both of its
operations, timm's each with probability one half; they resize bilinearly and train on 99 % of the images.
Their weight decay of 1e-4 is not multiplied with the learning rate of 1e-3: 0.1 in AdamW's terms. It spares biases and
norms, as here. Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_small import RECIPE as DEIT_SMALL

RECIPE = replace(
    DEIT_SMALL,
    epochs=90,
    min_lr=0.0,
    warmup_lr=0.0,
    warmup_epochs=8,  # 10,000 steps
    weight_decay=0.1,
    clip_norm=1.0,
    ema_decay=0.0,
    drop_path=0.0,
    smoothing=0.0,
    repeats=1,
    crop_min=0.05,
    rand_augment="rand-m10",
    mixup=0.2,
    cutmix=0.0,
    mix_group=1024,  # one lambda a batch
    erase=0.0,
)

if __name__ == "__main__":
    run(RECIPE, name="vit_small_90", description=__doc__)
