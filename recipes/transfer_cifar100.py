"""DeiT-B from ImageNet to CIFAR-100, 1000 epochs at 224 px: transfer_cifar10.py on other data.

    torchrun --nproc-per-node GPUS recipes/transfer_cifar100.py --data CIFAR100 [--init WEIGHTS]

Data: CIFAR100/train/<class>/*.png, 50,000 images of 100 classes, and CIFAR100/val/<class>/*.png, 10,000 (its test set).
Starts from the best weights of deit_base.py's run, with a new head.
Expected top-1: 90.8 % (the DeiT paper, table 7; distilled and at 384 px 91.4 %).
The authors published no settings for it: these are the ones they gave for CIFAR-10 and Cars.
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import run
from deitfast.recipes.transfer_cifar10 import RECIPE

if __name__ == "__main__":
    run(RECIPE, name="transfer_cifar100", description=__doc__)
