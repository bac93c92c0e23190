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
from typing import Any, TypeVar

import tyro
from rich.console import Console

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

    Args:
        program: what `--help` calls the command; by default this script's name.

    Raises:
        RecipeError: no such preset or method.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    name = parser.parse_known_args(words)[0].preset
    if name not in presets:
        raise RecipeError(f"there is no preset {name!r}.{suggest(name, presets)} There are {', '.join(presets)}.")
    preset: Any = presets[name]
    if isinstance(preset, Recipe):
        preset, words = _with_method(preset, words)
        description += f"\n\n--method NAME takes another method: {', '.join(METHODS)}, MODULE:NAME or FILE.py:NAME."
    with warnings.catch_warnings():  # tyro reads a user's own method all the same
        warnings.filterwarnings("ignore", message=".*does not match any type in Union")
        return tyro.cli(type(preset), default=preset, args=words, description=description, prog=program)


def _with_method(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe with the method that `--method` names, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    first, others = parser.parse_known_args(words)
    return recipe if first.method is None else replace(recipe, method=load_method(first.method)), others


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
