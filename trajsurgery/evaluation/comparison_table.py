"""Scores of several models on the same prompts and noise: means, paired gains, tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from trajsurgery.evaluation.geneval_folders import Sample
from trajsurgery.evaluation.paired_statistics import Gain, mean_gain, paired
from trajsurgery.training.prompts import ALL


@dataclass(frozen=True)
class Comparison:
    """Scores of several models on the same samples."""

    models: tuple[str, ...]
    """The first is the base that the others are compared with."""
    rewards: tuple[str, ...]
    samples: Sequence[Sample]
    scores: Mapping[str, Mapping[str, Sequence[float]]]
    """By model and reward, image by image."""

    @property
    def parts(self) -> dict[str, list[int]]:
        """Places of the images of "all" and, if there are several, of each category."""
        places: dict[str, list[int]] = {}
        for i, sample in enumerate(self.samples):
            category = sample.prompt.category
            places.setdefault("no category" if category == ALL else category, []).append(i)
        return {"all": list(range(len(self.samples))), **(places if len(places) > 1 else {})}

    def gain(self, model: str, reward: str, places: Sequence[int]) -> Gain:
        """Return a model's gain over the base, paired image by image; images of one prompt are not independent."""
        before, after = (torch.tensor([self.scores[m][reward][i] for i in places]) for m in (self.models[0], model))
        return paired(before, after, self._texts(places))

    def mean(self, model: str, reward: str, places: Sequence[int]) -> Gain:
        """Return a model's mean, as a gain over zero."""
        return mean_gain(torch.tensor([self.scores[model][reward][i] for i in places]), self._texts(places))

    def _texts(self, places: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.samples[i].prompt.text for i in places)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict (JSON); undefined figures are None."""

        def mean(model: str, reward: str, places: Sequence[int]) -> dict[str, Any]:
            mean = self.mean(model, reward, places)
            errors = {"standard_error": mean.se, "standard_error_by_prompt": mean.se_by_prompt}
            return {"mean": mean.after, **errors, "images": len(places)}

        def table(figures: Callable[[str, str, list[int]], dict[str, Any]], models: Sequence[str]) -> dict[str, Any]:
            return {
                part: {m: {r: _finite_or_none(figures(m, r, places)) for r in self.rewards} for m in models}
                for part, places in self.parts.items()
            }

        gains = table(lambda *at: asdict(self.gain(*at)), self.models[1:])
        images = [{**sample.facts, "scores": self.scores_of(i)} for i, sample in enumerate(self.samples)]
        return {"means": table(mean, self.models), **({"gains": gains} if self.models[1:] else {}), "images": images}

    def scores_of(self, place: int) -> dict[str, dict[str, float]]:
        """Return the scores of one sample's images, by model and reward."""
        return {model: {r: scores[r][place] for r in self.rewards} for model, scores in self.scores.items()}


def _finite_or_none(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in figures.items()}


def _table_cells(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield the headings, then the rows: all images first, then category by category."""
    base_model, *tuned_models = comparison.models
    yield "", base_model, *(heading for model in tuned_models for heading in (model, "gain"))
    for part, places in comparison.parts.items():
        for reward in comparison.rewards:
            base = comparison.mean(base_model, reward, places)
            cells = [f"{base.after:.4f}{_error(base)}"]
            for model in tuned_models:
                gain = comparison.gain(model, reward, places)
                cells += [f"{gain.after:.4f}", f"{gain.gain:+.4f}{_error(gain)}"]
            yield reward if part == "all" else f"{part}: {reward}", *cells


def _error(gain: Gain) -> str:
    """Format the standard error over prompts; a single prompt has none."""
    return "" if math.isnan(gain.se_by_prompt) else f" ± {gain.se_by_prompt:.4f}"


def _title(comparison: Comparison) -> str:
    numbers = {sample.number for sample in comparison.samples}
    paired_by = "; gains are paired image by image" if len(comparison.models) > 1 else ""
    return f"{len(comparison.samples)} images of {len(numbers)} prompts, ± standard errors over prompts{paired_by}"


def to_table(comparison: Comparison) -> Table:
    """Return the table for the terminal."""
    table, (headings, *rows) = Table(title=_title(comparison)), _table_cells(comparison)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if i < len(comparison.rewards) else "dim")
    return table


def to_markdown(comparison: Comparison) -> str:
    """Return the same table as Markdown."""
    headings, *rows = _table_cells(comparison)
    lines = [headings, ("---",) * len(headings), *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{_title(comparison)}\n\n{text}\n"


def to_csv(comparison: Comparison) -> str:
    """Return a CSV with one line for each image and model."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", *comparison.samples[0].facts, *comparison.rewards], lineterminator="\n")
    writer.writeheader()
    for model in comparison.models:
        for i, sample in enumerate(comparison.samples):
            writer.writerow({"model": model, **sample.facts, **comparison.scores_of(i)[model]})
    return text.getvalue()
