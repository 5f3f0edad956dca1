"""DeiT III-H fine-tuned at 224 px, 20 epochs on ImageNet-1k: deit3_base_224.py for another model.

    torchrun --nproc-per-node GPUS recipes/deit3_huge_224.py --data IMAGENET [--init WEIGHTS]

Starts from the best weights of deit3_huge.py's run. The settings are those of the authors' command.
Expected top-1: 85.2 % (README_revenge.md of facebookresearch/deit).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit3_base_224 import RECIPE as FINE_TUNE

RECIPE = replace(
    FINE_TUNE,
    model="deit3_huge_patch14_224",
    init="runs/deit3_huge/best",
    drop_path=0.55,
    mix_group=32,
)

if __name__ == "__main__":
    run(RECIPE, name="deit3_huge_224", description=__doc__)
