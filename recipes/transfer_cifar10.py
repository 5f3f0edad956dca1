"""DeiT-B from ImageNet to CIFAR-10, 1000 epochs at 224 px.

    torchrun --nproc-per-node GPUS recipes/transfer_cifar10.py --data CIFAR10 [--init WEIGHTS]

Data: CIFAR10/train/<class>/*.png, 50,000 images of 10 classes, and CIFAR10/val/<class>/*.png, 10,000 (its test set).
They are enlarged from 32 px. Starts from the best weights of deit_base.py's run, with a new head.
Expected top-1: 99.1 % (the DeiT paper, table 7; distilled and at 384 px 99.2 %).
Time on 1 and on 8 H100: not yet measured. Not yet run.

The settings are the authors' answer (facebookresearch/deit, issue 45) for CIFAR-10 and Cars:
no erasing, no drop-path, all else as on ImageNet. The learning rate is final: it is not scaled with the batch.
Any setting is a flag; `--help` lists them. `--data digits --smoke` proves the installation in about a minute.
"""

from deitfast import Recipe, run

RECIPE = Recipe(
    model="deit_base_patch16_224",
    init="runs/deit_base/best",
    reset_head=True,
    # Optimisation
    optimizer="sgd",
    epochs=1000,
    batch=768,
    lr=0.01,
    min_lr=1e-5,
    warmup_lr=1e-6,
    warmup_epochs=5,
    weight_decay=1e-4,
    beta1=0.9,  # momentum, Nesterov's
    clip_norm=0.0,
    ema_decay=0.99996,
    # Regularisation
    drop_path=0.0,
    drop_path_schedule="linear",
    loss="ce",
    smoothing=0.1,
    # Augmentation
    repeats=3,
    crop_min=0.08,
    crop_max=1.0,
    flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.0,  # the original's .3 is ignored beside RandAugment
    mixup=0.8,
    cutmix=1.0,
    mix_probability=1.0,
    mix_switch=0.5,
    mix_group=96,  # 768 over 8 processes
    erase=0.0,
    # Evaluation
    eval_crop_ratio=0.875,
)

if __name__ == "__main__":
    run(RECIPE, name="transfer_cifar10", description=__doc__)
