"""`trajsurgery report RUN` and `trajsurgery compare RUN RUN ...`: pages made of the folders of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from trajsurgery.errors import RecipeError


@dataclass(frozen=True)
class Report:
    """Make RUN/report.html anew: one page with curves, pictures, figures, settings; it needs no network."""

    run: Positional[Path]
    """The output folder of a training command, also of one that still runs."""


@dataclass(frozen=True)
class Compare:
    """Put runs side by side: a table here, and a page with their curves and pictures."""

    runs: Positional[tuple[Path, ...]]
    """Output folders of training commands, two or more."""
    output: Path = Path("comparison.html")
    """The page."""


def report(options: Report, console: Console) -> int:
    """Write the report and say where it is."""
    from trajsurgery.runs.reports.html_report import write_report

    console.print(f"{write_report(options.run)}", highlight=False, soft_wrap=True)
    return 0


def compare(options: Compare, console: Console) -> int:
    """Print the figures, write the page, and say where it is.

    Raises:
        RecipeError: fewer than two runs, or a folder that is none.
    """
    from rich.table import Table

    from trajsurgery.runs.reports.comparison_page import figures_table, read_runs, settings_table, write_comparison

    if len(options.runs) < 2:
        raise RecipeError("compare takes two runs or more: trajsurgery compare outputs/a outputs/b")
    runs = read_runs(options.runs)
    for headings, rows in (figures_table(runs), settings_table(runs)):
        table = Table(*headings)
        for row in rows:
            table.add_row(*row)
        console.print(table if rows else "no setting differs")
    console.print(f"{write_comparison(options.runs, options.output)}", highlight=False, soft_wrap=True)
    return 0
