"""DeiT-S, 300 epochs on ImageNet-1k: the DeiT paper's recipe, deit_base.py with a smaller model.

    torchrun --nproc-per-node GPUS recipes/deit_small.py --data IMAGENET

Expected top-1: 79.9 % (README_deit.md of facebookresearch/deit; raw weights, crop ratio .875).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_base import RECIPE as DEIT_BASE

RECIPE = replace(DEIT_BASE, model="deit_small_patch16_224")

if __name__ == "__main__":
    run(RECIPE, name="deit_small", description=__doc__)
