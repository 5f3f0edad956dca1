"""DeiT III-L, 800 epochs on ImageNet-1k at 192 px: the first of two stages, deit3_base.py with more drop-path.

    torchrun --nproc-per-node GPUS recipes/deit3_large.py --data IMAGENET
    torchrun --nproc-per-node GPUS recipes/deit3_large_224.py --data IMAGENET

Expected top-1 after the second stage: 84.9 % (README_revenge.md of facebookresearch/deit); none is
published of this one.
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit3_base import RECIPE as DEIT3_BASE

RECIPE = replace(DEIT3_BASE, model="deit3_large_patch16_224", image_size=192, drop_path=0.45, mix_group=64)

if __name__ == "__main__":
    run(RECIPE, name="deit3_large", description=__doc__)
