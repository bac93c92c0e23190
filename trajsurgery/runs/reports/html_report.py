"""report.html: everything that a run has recorded, on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trajsurgery.runs.reports.charts import Chart, all_charts
from trajsurgery.runs.reports.embedded_pictures import FRAME_SIDE, data_uri
from trajsurgery.runs.reports.html_page import Block, Page, block_html, write_page
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.runs.reports.run_report import model_label, remarks, table_rows, verdict
from trajsurgery.runs.reports.saved_pictures import SAMPLES

REPORT = "report.html"
GROUPS = {
    "Training": ("reward", "loss", "grad_norm", "terms", "distance", "clamped", "closed", "anchor", "times"),
    "Evaluation": ("validation", "gains", "categories", "calibration"),
    "Time and memory": ("parts", "memory"),
}
"""Sections of charts, by the charts' names."""


def write_report(folder: Path) -> Path:
    """Make report.html anew from the files of a run's folder; return its path. It can be opened without a network.

    Raises:
        RecipeError: it is no run's folder.
        OutputError: the file can't be written.
    """
    run = RunFolder.read(folder)
    charts = all_charts(run)
    grouped = {name: _chart_block(name, [c for c in charts if c.name in names]) for name, names in GROUPS.items()}
    blocks = (
        grouped["Training"],
        _samples(run),
        _filmstrip(run),
        grouped["Evaluation"],
        _figures(run),
        _plan(run),
        grouped["Time and memory"],
        _reproduce(run),
    )
    page = Page(
        title(run),
        subtitle(run),
        _cards(run),
        [] if run.evaluation is None else [verdict(run.evaluation), *remarks(run.evaluation)],
        [block for block in blocks if block is not None],
        charts,
        f"Made by trajsurgery from {run.name}/; `trajsurgery report` makes it anew.",
    )
    return write_page(folder / REPORT, page)


def title(run: RunFolder) -> str:
    """Return the page's title."""
    return f"{run.method} on {model_label(run.recipe.get('model', 'a model that was not recorded'))}"


def subtitle(run: RunFolder) -> str:
    """Return what was trained on, and where the run is."""
    started = str(run.info.get("started", "")).replace("T", " ")[:16]
    words = f"reward {run.recipe.get('reward', 'not recorded')}", run.info.get("machine"), started, f"folder {run.name}"
    return " · ".join(str(word) for word in words if word)


def _cards(run: RunFolder) -> list[tuple[str, str]]:
    evaluation, iterations = run.evaluation, run.iterations
    cards = list[tuple[str, str]]()
    if evaluation and evaluation.get("reward_gain") is not None:
        cards.append(gain_card(evaluation, "reward", "held-out reward"))
        if evaluation.get("rule_gain") is not None:
            cards.append(gain_card(evaluation, "rule", "rule-based score"))
    total, done = run.recipe.get("iterations"), iterations[-1]["iteration"] if iterations else 0
    cards.append(
        (f"{done}" if evaluation else f"{done} of {total}", "iterations" if evaluation else "iterations so far")
    )
    skipped = sum(record["skipped"] for record in iterations)
    cards += [(f"{skipped}", "skipped iterations")] if skipped else []
    seconds = evaluation["seconds"] if evaluation else sum(record["seconds"] for record in iterations)
    cards.append((duration(seconds), "in all, with evaluations" if evaluation else "of training"))
    memory = [record["memory"] for record in iterations if record.get("memory")]
    cards += [(f"{max(memory):.1f} GiB", "memory at its peak")] if memory else []
    return cards


def gain_card(evaluation: Mapping[str, Any], name: str, label: str) -> tuple[str, str]:
    """Return a gain with its interval of two paired standard errors, and its means."""
    error = evaluation.get(f"{name}_gain_se")
    interval = "" if error is None else f" ± {2 * error:.4f}"
    means = f"{evaluation[f'{name}_before']:.4f} → {evaluation[f'{name}_after']:.4f}"
    return f"{evaluation[f'{name}_gain']:+.4f}{interval}", f"{label}, {means}"


def duration(seconds: float) -> str:
    """Return a time in words."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def _chart_block(name: str, charts: list[Chart]) -> Block | None:
    return Block(name.lower().replace(" ", "-"), name, block_html("charts", charts)) if charts else None


def _samples(run: RunFolder) -> Block | None:
    folder = run.path / SAMPLES
    pairs = [
        {**pair, "before": _side(folder, pair["before"]), "after": _side(folder, pair["after"])}
        for pair in run.samples
        if all((folder / pair[when]["file"]).exists() for when in ("before", "after"))
    ]
    categories = list(dict.fromkeys(pair["category"] for pair in pairs))
    return Block("samples", "Samples", block_html("samples", pairs, categories)) if pairs else None


def _side(folder: Path, side: Mapping[str, Any]) -> dict[str, str]:
    mark = {True: " ✓", False: " ✗", None: ""}[side.get("correct")]
    return {"uri": data_uri(folder / side["file"]), "label": f"{score_text(side['reward'])}{mark}"}


def score_text(score: float | None) -> str:
    """Return a picture's score as text; a score that is not finite stands in the files as null."""
    return "not finite" if score is None else f"{score:.3f}"


def _filmstrip(run: RunFolder) -> Block | None:
    """Return the contact sheets as rows of prompts."""
    if not run.sheets:
        return None
    rows = list[dict[str, Any]]()
    for number, prompt in enumerate(run.sheets[0]["prompts"]):
        frames = [sheet_frame(sheet, number, prompt) for sheet in run.sheets]
        rows.append({"prompt": prompt, "frames": frames})
    iterations = [sheet["iteration"] for sheet in run.sheets]
    return Block("filmstrip", "Over training", block_html("filmstrip", rows, iterations))


def sheet_frame(sheet: Mapping[str, Any], number: int, prompt: str) -> dict[str, Any] | None:
    """Return a picture of a contact sheet; None if the sheet has no such one."""
    same = number < len(sheet["prompts"]) and sheet["prompts"][number] == prompt
    path = Path(sheet["folder"]) / sheet["files"][number] if same else None
    if path is None or not path.exists():
        return None
    label = score_text(sheet["rewards"][number])
    return {"uri": data_uri(path, FRAME_SIDE), "label": label, "iteration": sheet["iteration"]}


def figure_cells(record: Mapping[str, Any], name: str) -> list[str]:
    """Return before, after, gain and interval as texts."""
    before, after, gain, error = (record.get(f"{name}_{what}") for what in ("before", "after", "gain", "gain_se"))
    if before is None or after is None or gain is None:
        return ["none", "none", "none", ""]
    return [f"{before:.4f}", f"{after:.4f}", f"{gain:+.4f}", "" if error is None else f"± {2 * error:.4f}"]


def _figures(run: RunFolder) -> Block | None:
    """Return the table of the closing evaluation, categories included."""
    if run.evaluation is None:
        return None
    rows = [[label, *figure_cells(record, name)] for label, record, name in table_rows(run.evaluation)]
    for category, part in run.evaluation["categories"].items():
        for name, label in (("reward", "reward"), ("rule", "rules"), ("diversity", "diversity")):
            if f"{name}_before" in part and len(run.evaluation["categories"]) > 1:
                rows.append([f"{category}: {label}", *figure_cells(part, name)])
    headings = (f"{run.evaluation['images']} held-out images", "before", "after", "gain", "two standard errors")
    return Block("figures", "Figures", block_html("table", headings, rows))


def _plan(run: RunFolder) -> Block | None:
    picture = run.path / "plan.svg"
    uri = data_uri(picture) if picture.exists() else ""
    return Block("plan", "Plan", block_html("plan", uri, run.plan)) if uri or run.plan else None


def _reproduce(run: RunFolder) -> Block:
    versions = ", ".join(f"{name} {version}" for name, version in run.info.get("versions", {}).items())
    words = [versions, run.info.get("machine", ""), f"{run.info.get('processes', 1)} process(es)" if run.info else ""]
    config = json.dumps(run.recipe, indent=1) if run.recipe else "not recorded"
    line = " · ".join(word for word in words if word)
    return Block("reproduce", "Reproduce", block_html("reproduce", run.info.get("command", ""), line, config))
