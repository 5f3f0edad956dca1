"""DeiT-B from ImageNet to iNaturalist 2019, 360 epochs at 224 px: transfer_inat18.py on other data.

    torchrun --nproc-per-node GPUS recipes/transfer_inat19.py --data INAT19 [--init WEIGHTS]

Data: INAT19/train/<class>/*.jpg, 265,240 images of 1,010 classes, and INAT19/val/<class>/*.jpg, 3,003.
Starts from the best weights of deit_base.py's run, with a new head.
Expected top-1: 77.7 % (the DeiT paper, table 7; distilled and at 384 px 83.0 %).
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import run
from deitfast.recipes.transfer_inat18 import RECIPE

if __name__ == "__main__":
    run(RECIPE, name="transfer_inat19", description=__doc__)
