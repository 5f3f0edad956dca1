"""Recipes by name: those that are shipped, and files of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deitfast.errors import DeitfastError, did_you_mean

if TYPE_CHECKING:
    from deitfast.recipe import Recipe

_SHIPPED = Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Files of the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("[!_]*.py"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path to a Python file, or the name of a shipped one.

    Raises DeitfastError for anything else, with the nearest name and all names that there are.
    """
    shipped, path = shipped_recipes(), Path(name)
    if path.is_file() and path.suffix == ".py":
        return path
    if name in shipped:
        return shipped[name]
    own = [str(p) for folder in {Path(), path.parent} if folder.is_dir() for p in sorted(folder.glob("*.py"))]
    hint = f" Did you mean {path.stem}?" if path.stem in shipped else did_you_mean(name, [*shipped, *own])
    raise DeitfastError(
        f"no recipe {name}: neither a Python file nor the name of a shipped recipe.{hint} Shipped: {', '.join(shipped)}"
    )


def is_recipe(name: str) -> bool:
    """Whether `find_recipe` finds it."""
    try:
        return bool(find_recipe(name))
    except DeitfastError:
        return False


def load_recipe(name: str) -> Recipe:
    """RECIPE of what `find_recipe` finds. Raises DeitfastError where the file defines none."""
    import runpy

    from deitfast.recipe import Recipe

    path = find_recipe(name)
    sys.path.insert(0, str(path.resolve().parent))  # as when Python runs the file: it may import its neighbours
    try:
        recipe = runpy.run_path(str(path)).get("RECIPE")
    finally:
        sys.path.pop(0)
    if not isinstance(recipe, Recipe):
        raise DeitfastError(f"{path} defines no RECIPE. Give a file such as {shipped_recipes()['deit_base']}")
    return recipe
