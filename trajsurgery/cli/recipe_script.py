"""The command behind a script of recipes. It imports torch after the command line is read: `--help` is fast."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console

from trajsurgery.cli.command_line import INTERRUPTED, exit_code, read_recipe
from trajsurgery.training.noise.noise_recipe import NoiseRecipe
from trajsurgery.training.recipe import Recipe


def cli(
    presets: Mapping[str, Recipe] | Mapping[str, NoiseRecipe],
    description: str,
    args: Sequence[str] | None = None,
    program: Sequence[str] | None = None,
) -> int:
    """Read a recipe from the command line, run it, and return the exit code.

    Args:
        presets: recipes by the names that `--preset` takes; the first is the default.
        description: what `--help` says first.
        args: the words of the command line; by default those of this process.
        program: the words before them; by default `python` and this script.
    """
    words = list(sys.argv[1:] if args is None else args)
    before = ["python", sys.argv[0]] if program is None else list(program)

    def run(console: Console) -> int:
        recipe = read_recipe(presets, description, words, " ".join(program) if program else None)
        return _search(recipe, console) if isinstance(recipe, NoiseRecipe) else _train(recipe, console, before + words)

    return exit_code(run, " before the first iteration, or while pictures were made: the same command goes on")


def _train(recipe: Recipe, console: Console, command: Sequence[str]) -> int:
    from trajsurgery.cli import train_command
    from trajsurgery.training.distributed import ranks

    if recipe.dry_run:
        return train_command.dry_run(recipe, console, command)
    ranks.join(ranks.choose_device(recipe.device))
    result = train_command.main(recipe, console=console if ranks.is_main() else None)
    ranks.leave()
    return INTERRUPTED if result is None else 0


def _search(recipe: NoiseRecipe, console: Console) -> int:
    from trajsurgery.cli import noise_command

    return INTERRUPTED if noise_command.main(recipe, console=console) is None else 0
