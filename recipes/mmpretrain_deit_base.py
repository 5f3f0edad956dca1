"""DeiT-B, 300 epochs on ImageNet-1k with mmpretrain's settings, for comparison with its zoo.

    torchrun --nproc-per-node GPUS recipes/mmpretrain_deit_base.py --data IMAGENET

mmpretrain (configs/deit) trains without repeated augmentation, warms up for 20 epochs and clips gradients at norm 5.
Not repeated: its cosine starts after the warm-up, not at step 0, and erasing fills a rectangle with one colour.
Expected top-1: 81.76 % (mmpretrain's deit-base_16xb64_in1k). Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_base import RECIPE as DEIT_BASE

RECIPE = replace(
    DEIT_BASE,
    warmup_epochs=20,
    clip_norm=5.0,
    repeats=1,
    mix_group=64,  # a process's batch there
)

if __name__ == "__main__":
    run(RECIPE, name="mmpretrain_deit_base", description=__doc__)
