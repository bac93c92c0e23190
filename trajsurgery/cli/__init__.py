"""Commands: `trajsurgery score`, `trajsurgery evaluate`, and the commands behind recipe scripts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from trajsurgery.errors import SurgeryError
from trajsurgery.evaluation.options import Evaluate, Score

INTERRUPTED = 130

Command = (
    Annotated[Score, tyro.conf.subcommand("score", prefix_name=False)]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs it; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(Command, args=words, prog="trajsurgery", description=__doc__)
    console = Console()
    try:
        return _run(options, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from the images that are there")
        return INTERRUPTED
    except SurgeryError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1


def _run(options: Score | Evaluate, console: Console) -> int:
    if isinstance(options, Score):
        from trajsurgery.evaluation import picture_scores

        return picture_scores.score_command(options, console)
    from trajsurgery.evaluation import model_comparison

    return model_comparison.evaluate_models(options, console)


if __name__ == "__main__":
    sys.exit(main())
