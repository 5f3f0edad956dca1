"""Distilled DeiT-B fine-tuned at 384 px with distillation, 30 epochs on ImageNet-1k: the paper's best model.

    torchrun --nproc-per-node GPUS recipes/deit_base_distilled_384.py --data IMAGENET [--init WEIGHTS]

Starts from the best weights of deit_base_distilled_1000.py's run. The settings are deit_base_384.py's; the authors'
code cannot run this stage. Their teacher was itself adapted to 384 px; this one sees the images at its own 224 px, so
the result may differ.
Expected top-1: 85.2 % (README_deit.md of facebookresearch/deit; mean of both heads, crop ratio .875).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_base_384 import RECIPE as FINE_TUNE_384

RECIPE = replace(
    FINE_TUNE_384,
    model="deit_base_distilled_patch16_384",
    init="runs/deit_base_distilled_1000/best",
    distillation="hard",
    distillation_alpha=0.5,
    teacher="regnety_160.deit_in1k",
)

if __name__ == "__main__":
    run(RECIPE, name="deit_base_distilled_384", description=__doc__)
