"""DeiT-S with hard distillation, 300 epochs on ImageNet-1k: deit_base_distilled.py with a smaller student.

    torchrun --nproc-per-node GPUS recipes/deit_small_distilled.py --data IMAGENET

The teacher is the paper's RegNetY-16GF, timm's regnety_160.deit_in1k (pip install timm; downloaded once).
Offline: --teacher regnety_160.deit_in1k:regnety_160-a5fe301d.pth with the authors' file.
Expected top-1: 81.2 % (README_deit.md of facebookresearch/deit; mean of both heads, crop ratio .875).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_base_distilled import RECIPE as DISTILLED

RECIPE = replace(DISTILLED, model="deit_small_distilled_patch16_224")

if __name__ == "__main__":
    run(RECIPE, name="deit_small_distilled", description=__doc__)
