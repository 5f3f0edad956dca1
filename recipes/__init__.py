"""One experiment a file, imported as `deitfast.recipes` (a link to this folder), shipped with the package.

Another recipe builds on one of these wherever it lies:

    from dataclasses import replace

    from deitfast import run
    from deitfast.recipes.deit_tiny import RECIPE as DEIT_TINY

    RECIPE = replace(DEIT_TINY, epochs=100)

    if __name__ == "__main__":
        run(RECIPE, name="mine")
"""
