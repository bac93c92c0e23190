"""Charts of a run as plotly figures: plain dicts, which report.html draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trajsurgery.evaluation.calibration import interval
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.runs.reports.run_report import table_rows
from trajsurgery.runs.reports.validation_report import smoothed

GREY, BLUE = "#8a96a1", "#1f8fb8"
COLOURS = (BLUE, "#d1603d", "#d99a2b", "#8661c1", "#4a9d5f", "#8a96a1", "#c2559d", "#5b7fd1")


@dataclass(frozen=True)
class Chart:
    """A plotly figure with what stands around it."""

    name: str
    title: str
    data: list[dict[str, Any]]
    x: str
    """Titles of the axes."""
    y: str
    note: str = ""
    layout: dict[str, Any] | None = None

    def figure(self) -> dict[str, Any]:
        """Return what plotly draws."""
        axes = {"xaxis": {"title": {"text": self.x}}, "yaxis": {"title": {"text": self.y}}}
        return {"data": self.data, "layout": axes | (self.layout or {})}


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **more: Any) -> dict[str, Any]:
    """Return a trace of a curve."""
    style = {"color": colour, "width": 2}
    return {
        "type": "scatter",
        "mode": "lines" if len(x) > 1 else "markers",
        "x": x,
        "y": y,
        "name": name,
        "line": style,
    } | more


def curve(
    run: RunFolder, field: str, title: str, y: str, note: str = "", layout: dict[str, Any] | None = None
) -> Chart | None:
    """Return the curve of a field of the iterations' records, with its moving mean; None if it is nowhere."""
    records = [r for r in run.iterations if r.get(field) is not None]
    if not any(r[field] for r in records):
        return None
    times, values = [r["iteration"] for r in records], [r[field] for r in records]
    each = line(times, values, "each iteration", BLUE, opacity=0.5, line={"color": BLUE, "width": 1})
    return Chart(field, title, [each, line(times, smoothed(values), "moving mean", BLUE)], "iteration", y, note, layout)


def reward(run: RunFolder) -> Chart | None:
    """Return the reward over training, and on prompts that are not trained on."""
    chart = curve(run, "reward", "Reward", "reward")
    if chart is None:
        return None
    data, evaluation = chart.data, run.evaluation
    looks = run.of_kind("look")
    if looks:
        x, y = [r["iteration"] for r in looks], [r["reward"] for r in looks]
        data.append(line(x, y, "validation prompts", COLOURS[1], mode="lines+markers"))
    if evaluation:
        ends = (
            (0, "reward_before", "held-out, before", GREY),
            (evaluation["iterations"], "reward_after", "held-out, after", COLOURS[4]),
        )
        for t, field, name, colour in ends:
            error = {"type": "data", "array": [2 * (evaluation["reward_gain_se"] or 0)]} if t else {}
            marker = {"color": colour, "size": 11}
            data.append(line([t], [evaluation[field]], name, colour, mode="markers", marker=marker, error_y=error))
    note = (
        "Averaged weights make the validation and held-out images. The bar is two paired standard errors of the gain."
    )
    return Chart("reward", "Reward", data, "iteration", "reward", note)


def validation(run: RunFolder) -> Chart | None:
    """Return how far each scorer has moved on validation prompts, in standard deviations of its images."""
    looks = run.of_kind("look")
    if not looks:
        return None
    names = ["reward", *looks[0]["metrics"], *(["rule"] if looks[0]["rule"] is not None else [])]
    traces = list[dict[str, Any]]()
    for name, colour in zip(names, COLOURS * 3):
        values = [r["metrics"].get(name) if name in r["metrics"] else r[name] for r in looks]
        spread = looks[0]["spread"].get(name) or 1.0
        moved = [None if None in (v, values[0]) else (v - values[0]) / spread for v in values]
        label = "rules" if name == "rule" else name
        traces.append(line([r["iteration"] for r in looks], moved, label, colour, mode="lines+markers"))
    note = "A reward that rises while the others fall is being hacked."
    return Chart("validation", "Held-out scores while it trains", traces, "iteration", "change / spread", note)


def gradient_terms(run: RunFolder) -> Chart | None:
    """Return the norm of each kind of term of the closed form."""
    sheets = [sheet for sheet in run.sheets if sheet.get("terms")]
    if not sheets:
        return None
    x, kinds = [sheet["iteration"] for sheet in sheets], list(dict.fromkeys(k for s in sheets for k in s["terms"]))
    traces = [
        line(x, [sheet["terms"].get(kind) for sheet in sheets], kind, colour, mode="lines+markers")
        for kind, colour in zip(kinds, COLOURS * 3)
    ]
    note = "Of the iteration's plan on two held-out prompts, each term evaluated by itself."
    return Chart("terms", "Gradient norm by term of the closed form", traces, "iteration", "norm", note)


def times(run: RunFolder) -> Chart | None:
    """Return how often each time was trained."""
    counts = Counter(t for record in run.iterations for t in record["times"])
    if not counts:
        return None
    x = sorted(counts, reverse=True)
    bars = {"type": "bar", "x": x, "y": [counts[t] for t in x], "marker": {"color": BLUE}, "name": "iterations"}
    note = "T is noise, 0 the image: left is early in sampling."
    layout = {"xaxis": {"title": {"text": "time t of a model call with gradient"}, "autorange": "reversed"}}
    return Chart("times", "Trained times", [bars], "t", "iterations", note, layout)


def categories(run: RunFolder) -> Chart | None:
    """Return the gain of each category, with its interval."""
    parts: Mapping[str, Any] = (run.evaluation or {}).get("categories", {})
    rows = [(name, part) for name, part in parts.items() if part.get("reward_gain") is not None][::-1]
    if not rows:
        return None
    traces = list[dict[str, Any]]()
    for field, label, colour in (("reward", "reward", BLUE), ("rule", "rules", COLOURS[1])):
        shown = [(name, part) for name, part in rows if part.get(f"{field}_gain") is not None]
        if shown:
            errors = [2 * (part[f"{field}_gain_se"] or 0) for _, part in shown]
            words = [f"{p[f'{field}_before']:.4f} → {p[f'{field}_after']:.4f}" for _, p in shown]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": label,
                    "marker": {"color": colour, "size": 9},
                    "x": [part[f"{field}_gain"] for _, part in shown],
                    "y": [name for name, _ in shown],
                    "error_x": {"type": "data", "array": errors},
                    "text": [f"{text}, {part['images']} images" for text, (_, part) in zip(words, shown)],
                }
            )
    layout = {"yaxis": {"automargin": True, "type": "category"}, "height": 120 + 44 * len(rows), "hovermode": "closest"}
    note = "Bars: two paired standard errors, over images."
    return Chart("categories", "Gain by category", traces, "after - before", "", note, layout)


def gains(run: RunFolder) -> Chart | None:
    """Return each gain in its own standard errors."""
    if run.evaluation is None:
        return None
    rows = [row for row in table_rows(run.evaluation) if row[1].get(f"{row[2]}_gain_se")][::-1]
    x = [record[f"{name}_gain"] / record[f"{name}_gain_se"] for _, record, name in rows]
    text = [f"{record[f'{name}_before']:.4f} → {record[f'{name}_after']:.4f}" for _, record, name in rows]
    y = [label for label, _, _ in rows]
    trace = {"type": "scatter", "mode": "markers", "x": x, "y": y, "text": text, "marker": {"color": BLUE, "size": 10}}
    band = {"type": "rect", "x0": -2, "x1": 2, "y0": 0, "y1": 1, "yref": "paper", "fillcolor": GREY, "opacity": 0.15,
            "line": {"width": 0}}  # fmt: skip
    layout = {"yaxis": {"automargin": True}, "shapes": [band], "height": 120 + 44 * len(rows)}
    layout |= {"showlegend": False, "hovermode": "closest"}
    note = "In the grey band a gain may be chance."
    return Chart("gains", "All gains", [trace], "gain in paired standard errors", "", note, layout)


def calibration(run: RunFolder) -> Chart | None:
    """Return the share of right images by reward, before and after."""
    curves: Mapping[str, Any] | None = (run.evaluation or {}).get("calibration")
    if not curves:
        return None
    traces = list[dict[str, Any]]()
    for when, colour in (("before", GREY), ("after", BLUE)):
        bins = curves[when]["bins"]
        ends = [interval(b["correct"], b["images"]) for b in bins]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [high - b["correct"] for b, (_, high) in zip(bins, ends)],
            "arrayminus": [b["correct"] - low for b, (low, _) in zip(bins, ends)],
        }
        x, y = [b["score"] for b in bins], [b["correct"] for b in bins]
        traces.append(line(x, y, when, colour, mode="lines+markers", error_y=error))
    layout = {"yaxis": {"title": {"text": "share that the rules call right"}, "range": [-0.03, 1.03]}}
    return Chart("calibration", "Calibration of the reward", traces, "reward", "", "Bars: 95% intervals.", layout)


def parts(run: RunFolder) -> Chart | None:
    """Return the seconds of each part of an iteration, stacked."""
    records = [r for r in run.iterations if r.get("parts")]
    if not records:
        return None
    x, names = [r["iteration"] for r in records], list(dict.fromkeys(n for r in records for n in r["parts"]))
    columns = {name: [r["parts"].get(name, 0.0) for r in records] for name in names}
    columns["the rest"] = [max(0.0, (r["seconds"] or 0.0) - sum(r["parts"].values())) for r in records]
    traces = [
        line(x, smoothed(values), name, colour, stackgroup="parts", line={"color": colour, "width": 0.5})
        for (name, values), colour in zip(columns.items(), COLOURS * 3)
    ]
    return Chart("parts", "Time of an iteration", traces, "iteration", "seconds", "Moving means.")


def all_charts(run: RunFolder) -> list[Chart]:
    """Return the charts that a run has data for."""
    closed = "Share of scores at or above lambda, which give no gradient."
    clamped = "Near 1, tau is too large and the weights no longer differ."
    share = {"yaxis": {"range": [-0.03, 1.03], "title": {"text": "share"}}}
    made = (
        reward(run),
        validation(run),
        curve(run, "loss", "Loss", "loss"),
        curve(run, "grad_norm", "Gradient norm", "norm", "Before clipping."),
        gradient_terms(run),
        curve(run, "distance", "Distance of the leaps", "distance", "Mean |x_t - prediction| of connected landings."),
        curve(run, "clamped", "Distances below tau", "share", clamped, share),
        curve(run, "closed", "Closed hinge", "share", closed, share),
        curve(run, "anchor", "Distance from the untuned model", "mean (v - v_base)²", "At one drawn time."),
        times(run),
        gains(run),
        categories(run),
        calibration(run),
        parts(run),
        curve(run, "memory", "Memory", "GiB", "At the peak so far."),
    )
    return [chart for chart in made if chart is not None]
