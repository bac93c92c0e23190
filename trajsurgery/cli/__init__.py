"""Differentiable surgery on the sampling trajectories of flow-matching models: training, proofs, evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional

from trajsurgery.cli import recipe_names
from trajsurgery.cli.command_line import exit_code
from trajsurgery.cli.doctor import Doctor, examine
from trajsurgery.cli.export_command import Export, export
from trajsurgery.cli.method_commands import Explain, Prove, explain, prove
from trajsurgery.cli.report_commands import Compare, Report, compare, report
from trajsurgery.evaluation.options import Evaluate, Score


@dataclass(frozen=True)
class Train:
    """Train with a recipe, and the recipe's flags: `trajsurgery train leapalign-flux --help` lists them."""

    recipe: Positional[str]
    """A recipe that comes with the library, such as leapalign-flux, or a file such as my_recipe.py."""


@dataclass(frozen=True)
class PlanMemory:
    """Count the memory and operations of a recipe, without weights or a GPU; with --fit 24GB, search what fits."""

    recipe: Positional[str]
    """A recipe that comes with the library, such as leapalign-flux, or a file such as my_recipe.py."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[PlanMemory, tyro.conf.subcommand("plan-memory", prefix_name=False)]
    | Annotated[Score, tyro.conf.subcommand("score", prefix_name=False)]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
    | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)]
    | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
    | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
    | Annotated[Explain, tyro.conf.subcommand("explain", prefix_name=False)]
    | Annotated[Prove, tyro.conf.subcommand("prove", prefix_name=False)]
    | Annotated[Doctor, tyro.conf.subcommand("doctor", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run it; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) > 1 and words[0] in recipe_names.COMMANDS and not words[1].startswith("-"):
        return recipe_names.run(words)
    options: Any = tyro.cli(Command, args=words, prog="trajsurgery", description=__doc__)
    return exit_code(partial(_run, options), ": the same command goes on from the images that exist")


def _run(options: Any, console: Console) -> int:
    return RUN[type(options)](options, console)


def _score(options: Score, console: Console) -> int:
    from trajsurgery.evaluation import picture_scores

    return picture_scores.score_command(options, console)


def _evaluate(options: Evaluate, console: Console) -> int:
    from trajsurgery.evaluation import model_comparison

    return model_comparison.evaluate_models(options, console)


RUN: dict[type, Callable[[Any, Console], int]] = {
    Score: _score,
    Evaluate: _evaluate,
    Report: report,
    Export: export,
    Compare: compare,
    Explain: explain,
    Prove: prove,
    Doctor: examine,
}
"""What runs a command, by its options."""
