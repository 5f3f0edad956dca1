"""DeiT III-H, 800 epochs on ImageNet-1k at 154 px: the first of two stages, deit3_base.py with more drop-path.

    torchrun --nproc-per-node GPUS recipes/deit3_huge.py --data IMAGENET
    torchrun --nproc-per-node GPUS recipes/deit3_huge_224.py --data IMAGENET

The authors train at 160 px, of which 11 x 11 patches of 14 px cover 154: the model never saw the last 6. Here the
images have 154 px, the same number of patches and the whole crop in view.
Expected top-1 after the second stage: 85.2 % (README_revenge.md of facebookresearch/deit); none is
published of this one.
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit3_base import RECIPE as DEIT3_BASE

RECIPE = replace(DEIT3_BASE, model="deit3_huge_patch14_224", image_size=154, drop_path=0.6, mix_group=64)

if __name__ == "__main__":
    run(RECIPE, name="deit3_huge", description=__doc__)
