"""Commands: `trajsurgery score`, `trajsurgery evaluate`, and the commands behind recipe scripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import tyro
from rich.console import Console

from trajsurgery.cli.command_line import exit_code
from trajsurgery.evaluation.options import Evaluate, Score

Command = (
    Annotated[Score, tyro.conf.subcommand("score", prefix_name=False)]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run it; return the exit code."""
    options = tyro.cli(Command, args=arguments, prog="trajsurgery", description=__doc__)
    return exit_code(partial(_run, options), ": the same command goes on from the images that exist")


def _run(options: Score | Evaluate, console: Console) -> int:
    if isinstance(options, Score):
        from trajsurgery.evaluation import picture_scores

        return picture_scores.score_command(options, console)
    from trajsurgery.evaluation import model_comparison

    return model_comparison.evaluate_models(options, console)
