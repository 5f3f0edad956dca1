"""DeiT-B with hard distillation, 300 epochs on ImageNet-1k: deit_base.py with a distillation token and a teacher.

    torchrun --nproc-per-node GPUS recipes/deit_base_distilled.py --data IMAGENET

The teacher is the paper's RegNetY-16GF, timm's regnety_160.deit_in1k (pip install timm; downloaded once).
Offline: --teacher regnety_160.deit_in1k:regnety_160-a5fe301d.pth with the authors' file.
Expected top-1: 83.4 % (README_deit.md of facebookresearch/deit; mean of both heads, crop ratio .875).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_base import RECIPE as DEIT_BASE

RECIPE = replace(
    DEIT_BASE,
    model="deit_base_distilled_patch16_224",
    distillation="hard",
    distillation_alpha=0.5,
    teacher="regnety_160.deit_in1k",
)

if __name__ == "__main__":
    run(RECIPE, name="deit_base_distilled", description=__doc__)
