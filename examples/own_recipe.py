"""A recipe of your own, built on a shipped one. Every field of deitfast.Recipe is a flag on top of it.

deitfast train examples/own_recipe.py --data digits
torchrun --nproc-per-node 8 examples/own_recipe.py --data /data/pets --epochs 100
"""

from dataclasses import replace

from deitfast import run
from deitfast.recipes.deit_digits import RECIPE as DIGITS

RECIPE = replace(DIGITS, epochs=20, mixup=0.0, drop_path=0.05)

if __name__ == "__main__":
    run(RECIPE, name="own_recipe", description=__doc__)  # the run folder: runs/own_recipe
