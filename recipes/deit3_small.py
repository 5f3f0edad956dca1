"""DeiT III-S, 800 epochs on ImageNet-1k at 224 px: deit3_base.py with its own learning rate and drop-path.

    torchrun --nproc-per-node GPUS recipes/deit3_small.py --data IMAGENET

Expected top-1: 81.4 % (README_revenge.md of facebookresearch/deit). This size has no second stage at 224 px.
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit3_base import RECIPE as DEIT3_BASE

RECIPE = replace(DEIT3_BASE, model="deit3_small_patch16_224", image_size=224, lr=4e-3, drop_path=0.05)

if __name__ == "__main__":
    run(RECIPE, name="deit3_small", description=__doc__)
