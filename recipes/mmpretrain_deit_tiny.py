"""DeiT-Ti, 300 epochs on ImageNet-1k with mmpretrain's settings: mmpretrain_deit_base.py without drop-path and EMA.

    torchrun --nproc-per-node GPUS recipes/mmpretrain_deit_tiny.py --data IMAGENET

Expected top-1: 74.50 % (mmpretrain's deit-tiny_4xb256_in1k). Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.mmpretrain_deit_base import RECIPE as MMPRETRAIN_BASE

RECIPE = replace(
    MMPRETRAIN_BASE,
    model="deit_tiny_patch16_224",
    drop_path=0.0,
    ema_decay=0.0,
    mix_group=256,  # a process's batch there
)

if __name__ == "__main__":
    run(RECIPE, name="mmpretrain_deit_tiny", description=__doc__)
