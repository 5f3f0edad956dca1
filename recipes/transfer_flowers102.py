"""DeiT-B from ImageNet to Oxford Flowers-102, 1000 epochs at 224 px: transfer_cifar10.py on other data.

    torchrun --nproc-per-node GPUS recipes/transfer_flowers102.py --data FLOWERS102 [--init WEIGHTS]

Data: FLOWERS102/train/<class>/*.jpg, 2,040 images of 102 classes (its training and validation sets together),
and FLOWERS102/val/<class>/*.jpg, 6,149 (its test set).
Starts from the best weights of deit_base.py's run, with a new head.
Expected top-1: 98.4 % (the DeiT paper, table 7; distilled and at 384 px 98.9 %).
The authors published no settings for it: these are the ones they gave for CIFAR-10 and Cars.
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import run
from deitfast.recipes.transfer_cifar10 import RECIPE

if __name__ == "__main__":
    run(RECIPE, name="transfer_flowers102", description=__doc__)
