"""DeiT-B fine-tuned at 384 px, 30 epochs on ImageNet-1k.

    torchrun --nproc-per-node GPUS recipes/deit_base_384.py --data IMAGENET [--init WEIGHTS]

Starts from the best weights of deit_base.py's run; --init takes any other weight file of DeiT-B. The position
embeddings are interpolated. The authors fine-tune in evaluation mode, which switches drop-path off and nothing else:
here drop_path=0 says so. The settings are those of their command.
Expected top-1: 82.9 % (README_deit.md of facebookresearch/deit; raw weights, crop ratio .875).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_base import RECIPE as DEIT_BASE

RECIPE = replace(
    DEIT_BASE,
    model="deit_base_patch16_384",
    init="runs/deit_base/best",
    epochs=30,
    batch=512,
    lr=5e-6,  # and stays there after the warm-up: min_lr is the same
    min_lr=5e-6,
    warmup_lr=1e-6,
    warmup_epochs=5,
    weight_decay=1e-8,
    drop_path=0.0,
    mix_group=32,  # a process's batch in the authors' command
)

if __name__ == "__main__":
    run(RECIPE, name="deit_base_384", description=__doc__)
