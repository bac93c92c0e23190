"""What all commands share: a recipe read from presets and flags, exit codes, printed errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from trajsurgery.cli.config_file import check_names, config_words
from trajsurgery.errors import RecipeError, SurgeryError, suggest
from trajsurgery.training.method_names import METHODS, load_method
from trajsurgery.training.recipe import Recipe

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM stopped. The same command resumes it."""

AnyRecipe = TypeVar("AnyRecipe")


def read_recipe(
    presets: Mapping[str, AnyRecipe], description: str, args: Sequence[str] | None, program: str | None = None
) -> AnyRecipe:
    """Return the recipe of `--preset` (the first one by default) with `--method`, changed by the other flags.

    `--config FILE` stands for the settings of a file; flags go before them, wherever they stand.

    Args:
        program: what `--help` calls the command; by default this script's name.

    Raises:
        RecipeError: no such preset or method; a config that can't be read or names what is no setting.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    options, words = parser.parse_known_args(words)
    if options.config is not None:
        words = [*config_words(options.config), *words]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    name = parser.parse_known_args(words)[0].preset
    if name not in presets:
        raise RecipeError(f"there is no preset {name!r}.{suggest(name, presets)} There are {', '.join(presets)}.")
    preset: Any = presets[name]
    if isinstance(preset, Recipe):
        preset, words = _with_method(preset, words)
        description = f"{description}\n\n{often_used(preset)}"
    if options.config is not None:
        check_names(options.config, preset.to_dict())
    with warnings.catch_warnings():  # tyro reads a user's own method all the same
        warnings.filterwarnings("ignore", message=".*does not match any type in Union")
        return tyro.cli(type(preset), default=preset, args=words, description=description, prog=program)


def _with_method(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe with the method that `--method` names, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    first, others = parser.parse_known_args(words)
    return recipe if first.method is None else replace(recipe, method=load_method(first.method)), others


def often_used(recipe: Recipe) -> str:
    """Return the flags that are turned most, with what they are now: the help's first lines."""
    lines = {
        "--preset NAME": f"where all other settings come from: {recipe.preset}",
        "--method NAME": f"{type(recipe.method).__name__}; or another, below",
        "--model NAME": f"{recipe.model}; a folder or a cached hub id",
        "--reward NAME": f"{recipe.reward}; hpsv2.1, pickscore, ..., or your own, FILE.py:NAME",
        "--prompts FILE": f"{recipe.prompts}; --heldout FILE: {recipe.heldout}",
        "--iterations N": f"{recipe.iterations} steps of the optimiser",
        "--rollout.batch N": f"{recipe.rollout.batch} images an iteration",
        "--optimiser.rate R": f"{recipe.optimiser.rate:g}",
        "--train.what full|lora": f"{recipe.train.what}",
        "--output FOLDER": f"{recipe.output}; a run that was interrupted there goes on",
        "--config FILE": "settings from YAML, TOML or JSON, such as OUTPUT/recipe.yaml of a run; flags change them",
    }
    width = max(map(len, lines))
    rows = "\n".join(f"  {flag:{width}}  {text}" for flag, text in lines.items())
    return f"Often used:\n{rows}\n\nMethods: {', '.join(METHODS)}, or your own, MODULE:NAME or FILE.py:NAME."


def exit_code(run: Callable[[Console], int], interrupted: str) -> int:
    """Call `run` and return its exit code; of an interruption or a SurgeryError print one line, no traceback.

    SIGTERM interrupts as Ctrl-C does.

    Args:
        interrupted: what the line for an interruption says after that word.
    """
    console = Console()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(console)
    except KeyboardInterrupt:
        console.print(f"interrupted{interrupted}")
        return INTERRUPTED
    except SurgeryError as error:
        rank = os.environ.get("RANK", "0")  # set by torchrun
        console.print(f"{'' if rank == '0' else f'rank {rank}: '}[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
