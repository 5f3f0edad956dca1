"""A small DeiT learns handwritten digits from scratch: the whole engine in a few minutes on two CPU cores.

    torchrun recipes/deit_digits.py

Trains on the packaged 1,437 UCI digits and tests on the 360 held out. What `make demo` runs; not an experiment of the
paper, whose schedule and augmentation are for a data set a thousand times larger.
"""

from deitfast import Recipe, run

RECIPE = Recipe(
    model="deit_digits_patch4_16",
    data="digits",
    epochs=60,
    batch=32,
    lr=1e-3,
    warmup_epochs=2,
    ema_decay=0.99,
    drop_path=0.0,
    smoothing=0.0,
    repeats=1,
    crop_min=0.7,
    flip=0.0,  # a mirrored 2 is no 2
    rand_augment="none",
    mixup=0.8,
    cutmix=0.0,  # half of a digit is another digit
    mix_probability=0.3,
    erase=0.25,
    eval_crop_ratio=1.0,
    eval_every=10,
)

if __name__ == "__main__":
    run(RECIPE, name="deit_digits", description=__doc__)
