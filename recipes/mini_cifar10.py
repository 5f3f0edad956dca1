"""A DeiT of 2.7 M parameters on CIFAR-10 from scratch at 32 px: the paper's recipe in miniature, for one GPU.

    torchrun recipes/mini_cifar10.py --data CIFAR10

Data: a folder with the authors' cifar-10-python.tar.gz, or with train/<class>/ and test/<class>/: 50,000 images and
10,000 held out. `python -m benchmarks.miniature --recipe mini_cifar10` trains it in every way of the paper's table.
Expected top-1: nothing is published for this model. Time on 1 and on 8 H100: not yet measured. Not yet run.

The settings are the paper's, but for the model, whose patch of 4 px gives 64 patches; half of the batch and of the
learning rate, which are in the paper's proportion; and an average that reaches as far back in epochs.
"""

from deitfast import Recipe, run

RECIPE = Recipe(
    model="deit_mini_patch4_32",
    # Optimisation
    optimizer="adamw",
    epochs=300,
    batch=512,
    lr=5e-4,
    min_lr=1e-5,
    warmup_lr=1e-6,
    warmup_epochs=5,
    weight_decay=0.05,
    clip_norm=0.0,
    ema_decay=0.9995,  # 20 epochs of 97 steps, as the paper's .99996 of 1,251 steps
    # Regularisation
    drop_path=0.1,
    drop_path_schedule="linear",
    loss="ce",
    smoothing=0.1,
    # Augmentation
    repeats=3,
    crop_min=0.08,
    crop_max=1.0,
    flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.0,
    mixup=0.8,
    cutmix=1.0,
    mix_probability=1.0,
    mix_switch=0.5,
    mix_group=128,
    erase=0.25,
    # Evaluation
    eval_crop_ratio=1.0,  # of 32 px there is nothing to cut off
    eval_every=10,
)

if __name__ == "__main__":
    run(RECIPE, name="mini_cifar10", description=__doc__)
