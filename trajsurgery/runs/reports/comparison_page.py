"""Several runs on one page: their curves in one picture, their figures in one table, their pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trajsurgery.errors import RecipeError
from trajsurgery.runs.reports.charts import COLOURS, Chart, line
from trajsurgery.runs.reports.embedded_pictures import FRAME_SIDE, data_uri
from trajsurgery.runs.reports.html_page import Block, Page, block_html, write_page
from trajsurgery.runs.reports.html_report import duration, figure_cells, score_text
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.runs.reports.run_report import table_rows
from trajsurgery.runs.reports.saved_pictures import SAMPLES
from trajsurgery.runs.reports.validation_report import smoothed
from trajsurgery.training.recipe import flat_settings

CURVES = {
    "reward": "Reward, moving mean",
    "loss": "Loss, moving mean",
    "grad_norm": "Gradient norm, moving mean",
    "distance": "Distance of the leaps, moving mean",
    "clamped": "Distances below tau, moving mean",
}
"""Fields of the iterations' records that are drawn, with the titles of their charts."""

PICTURES = 12


def read_runs(folders: Sequence[Path]) -> dict[str, RunFolder]:
    """Return the runs by names: those of their folders, or the paths where these are alike.

    Raises:
        RecipeError: a folder is no run's, or stands there twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RecipeError("compare: a run stands there twice. Name each folder once.")
    runs = [RunFolder.read(folder) for folder in folders]
    names = [run.name for run in runs]
    alike = len(set(names)) < len(names)
    return {str(run.path) if alike else run.name: run for run in runs}


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page; return its path.

    Raises:
        RecipeError: as `read_runs`.
        OutputError: the file can't be written.
    """
    runs = read_runs(folders)
    charts = [chart for field, title in CURVES.items() if (chart := _overlay(runs, field, title))]
    blocks = [
        Block("figures", "Figures", block_html("table", *figures_table(runs))),
        Block("curves", "Curves", block_html("charts", charts)),
        _pictures(runs),
        _settings(runs),
    ]
    present = [block for block in blocks if block is not None]
    names = " · ".join(runs)
    page = Page(f"{len(runs)} runs compared", names, [], [], present, charts, "Made by trajsurgery compare.")
    return write_page(path, page)


def figures_table(runs: Mapping[str, RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: what each run's closing evaluation found, gains with two paired standard errors."""
    columns = [_column(run) for run in runs.values()]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    return ["", *runs], [[label, *(column.get(label, "") for column in columns)] for label in labels]


def _column(run: RunFolder) -> dict[str, str]:
    evaluation, iterations = run.evaluation, run.iterations
    seconds = evaluation["seconds"] if evaluation else sum(record["seconds"] for record in iterations)
    column = {
        "method": run.method,
        "iterations": str(iterations[-1]["iteration"] if iterations else 0) + ("" if evaluation else ", not ended"),
        "time": duration(seconds),
    }
    for label, record, name in table_rows(evaluation) if evaluation else ():
        before, after, gain, error = figure_cells(record, name)
        column[label] = f"{before} → {after} ({gain} {error})"
    return column


def settings_table(runs: Mapping[str, RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the settings in which the runs differ."""
    flat = [flat_settings(run.recipe) for run in runs.values()]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name != "output"]
    rows = [[name, *(str(settings.get(name, "")) for settings in flat)] for name in names]
    return ["setting", *runs], [row for row in rows if len(set(row[1:])) > 1]


def _settings(runs: Mapping[str, RunFolder]) -> Block | None:
    headings, rows = settings_table(runs)
    return Block("settings", "Settings that differ", block_html("table", headings, rows)) if rows else None


def _overlay(runs: Mapping[str, RunFolder], field: str, title: str) -> Chart | None:
    traces = list[dict[str, Any]]()
    for (name, run), colour in zip(runs.items(), COLOURS * 9):
        records = [record for record in run.iterations if record.get(field) is not None]
        if any(record[field] for record in records):
            x, y = [record["iteration"] for record in records], [record[field] for record in records]
            traces.append(line(x, smoothed(y), name, colour))
    return Chart(field, title, traces, "iteration", field.replace("grad_norm", "norm")) if traces else None


def _pictures(runs: Mapping[str, RunFolder]) -> Block | None:
    """Return the same prompts' pictures: of the first run's untuned model, and of each tuned one."""
    by_prompt = [{pair["prompt"]: pair for pair in run.samples} for run in runs.values()]
    rows = list[dict[str, Any]]()
    for prompt in [prompt for prompt in by_prompt[0] if all(prompt in pairs for pairs in by_prompt)][:PICTURES]:
        first = _frame(next(iter(runs.values())), by_prompt[0][prompt]["before"])
        others = [_frame(run, pairs[prompt]["after"]) for run, pairs in zip(runs.values(), by_prompt)]
        rows.append({"prompt": prompt, "frames": [first, *others]})
    return Block("pictures", "Pictures", block_html("side_by_side", list(runs), rows)) if rows else None


def _frame(run: RunFolder, side: Mapping[str, Any]) -> dict[str, str] | None:
    path = run.path / SAMPLES / side["file"]
    return {"uri": data_uri(path, FRAME_SIDE), "label": score_text(side["reward"])} if path.exists() else None
