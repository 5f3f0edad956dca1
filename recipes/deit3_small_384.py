"""DeiT III-S fine-tuned at 384 px, 20 epochs on ImageNet-1k: deit3_base_224.py for another model.

    torchrun --nproc-per-node GPUS recipes/deit3_small_384.py --data IMAGENET [--init WEIGHTS]

Starts from the best weights of deit3_small.py's run. The settings are those of the authors' command.
Expected top-1: 83.4 % (README_revenge.md of facebookresearch/deit).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit3_base_224 import RECIPE as FINE_TUNE

RECIPE = replace(
    FINE_TUNE,
    model="deit3_small_patch16_384",
    init="runs/deit3_small/best",
    drop_path=0.0,
)

if __name__ == "__main__":
    run(RECIPE, name="deit3_small_384", description=__doc__)
