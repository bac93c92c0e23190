"""The training command: `main(recipe)` runs a recipe from start to end, `dry_run` says what it would take."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from trajsurgery.cli import fit_command
from trajsurgery.dry_run import plan_memory, table
from trajsurgery.runs.trainer import Trainer
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.components import RunComponents
from trajsurgery.training.recipe import Recipe


def dry_run(recipe: Recipe, console: Console, command: Sequence[str]) -> int:
    """Print what the run would take, or what fits, and write it to memory.json; return the exit code.

    Args:
        command: the whole command line, which a search repeats with other flags.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype")  # RMSNorm under autocast is not fused on a CPU
        if recipe.fit is not None:
            plan = fit_command.search(recipe, console, command)
        else:
            with console.status("counting under fake tensors"):
                plan = plan_memory(recipe)
    console.print(table(plan), highlight=False)
    path = recipe.output / "memory.json"
    write_atomically(path, lambda partial: partial.write_text(json.dumps(plan.to_dict(), indent=1) + "\n"))
    console.print(f"In {path}.", highlight=False)
    return 0


def main(recipe: Recipe, scene: RunComponents | None = None, console: Console | None = None) -> dict[str, Any] | None:
    """Run a recipe with a `Trainer`; return what `Trainer.train` does.

    Args:
        scene: pipeline, rewards and prompts, if they should not be loaded from the recipe's names.
    """
    return Trainer(recipe, components=scene, console=console).train()
