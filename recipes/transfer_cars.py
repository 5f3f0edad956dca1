"""DeiT-B from ImageNet to Stanford Cars, 1000 epochs at 224 px: transfer_cifar10.py on other data.

    torchrun --nproc-per-node GPUS recipes/transfer_cars.py --data CARS [--init WEIGHTS]

Data: CARS/train/<class>/*.jpg, 8,144 images of 196 classes, and CARS/val/<class>/*.jpg, 8,041 (its test set).
Starts from the best weights of deit_base.py's run, with a new head.
Expected top-1: 92.1 % (the DeiT paper, table 7; distilled and at 384 px 93.9 %).
The settings are the authors' answer (facebookresearch/deit, issue 45) for CIFAR-10 and Cars.
Time on 1 and on 8 H100: not yet measured. Not yet run.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import run
from deitfast.recipes.transfer_cifar10 import RECIPE

if __name__ == "__main__":
    run(RECIPE, name="transfer_cars", description=__doc__)
