"""Recipes by name, and recipe files: what `trajsurgery train` and `trajsurgery plan-memory` read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trajsurgery.cli.command_line import exit_code
from trajsurgery.cli.recipe_script import cli
from trajsurgery.errors import RecipeError, suggest
from trajsurgery.rewards.user_code import import_named
from trajsurgery.training.noise.noise_recipe import NoiseRecipe
from trajsurgery.training.recipe import Recipe

COMMANDS = {"train": (), "plan-memory": ("--dry-run",)}
"""Commands that take a recipe and its flags, with the flags that they add."""


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the library, by names such as leapalign-flux."""
    package = Path(__file__).parents[1]
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.py"))}


def load_presets(recipe: str) -> tuple[Mapping[str, Any], str]:
    """Return the presets and the description of a recipe.

    Args:
        recipe: a shipped recipe's name, or a Python file that holds `RECIPES`, a dict of recipes by their presets.

    Raises:
        RecipeError: there is no such recipe or file, it can't be imported, or it holds no recipes.
    """
    shipped = shipped_recipes()
    path = Path(recipe) if recipe.endswith(".py") else shipped.get(recipe.replace("_", "-"))
    if path is None:
        raise RecipeError(
            f"there is no recipe {recipe!r}.{suggest(recipe, shipped)} It is {', '.join(shipped)}, or a file such as "
            "my_recipe.py."
        )
    presets = import_named(f"{path}:RECIPES")
    values: list[Any] = list(presets.values()) if isinstance(presets, Mapping) else []
    if not values or not all(isinstance(value, Recipe | NoiseRecipe) for value in values):
        raise RecipeError(f"{path}: RECIPES is not a dict of recipes by the names of presets, such as presets(method).")
    return presets, import_named(f"{path}:__doc__") or str(path)


def run(words: Sequence[str]) -> int:
    """Run `train RECIPE [flags]` or `plan-memory RECIPE [flags]`; return the exit code."""
    command, recipe, *flags = words
    loaded = list[tuple[Mapping[str, Any], str]]()

    def load(_: Console) -> int:
        loaded.append(load_presets(recipe))
        if command == "plan-memory" and isinstance(next(iter(loaded[0][0].values())), NoiseRecipe):
            raise RecipeError(f"{recipe} optimises noise: memory is planned for recipes that train.")
        return 0

    if failed := exit_code(load, ""):
        return failed
    presets, description = loaded[0]
    return cli(presets, description, [*flags, *COMMANDS[command]], ("trajsurgery", command, recipe))
