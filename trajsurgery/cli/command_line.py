"""What all commands share: a recipe read from presets and flags, exit codes, printed errors."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro
from rich.console import Console

from trajsurgery.errors import SurgeryError

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM stopped. The same command resumes it."""

AnyRecipe = TypeVar("AnyRecipe")


def read_recipe(presets: Mapping[str, AnyRecipe], description: str, args: Sequence[str] | None) -> AnyRecipe:
    """Return the recipe of `--preset` (the first one by default), changed by the other flags."""
    words = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    preset = presets[parser.parse_known_args(words)[0].preset]
    with warnings.catch_warnings():  # tyro reads a user's own method all the same
        warnings.filterwarnings("ignore", message=".*does not match any type in Union")
        return tyro.cli(type(preset), default=preset, args=words, description=description, console_outputs=True)


def exit_code(run: Callable[[Console], int], interrupted: str) -> int:
    """Call `run` and return its exit code; of an interruption or a SurgeryError print one line, no traceback.

    Args:
        interrupted: what the line for an interruption says after that word.
    """
    console = Console()
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
