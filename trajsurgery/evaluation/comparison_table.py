"""Scores of several models on the same prompts and noise: means, paired gains, tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from trajsurgery.evaluation.geneval_folders import Sample
from trajsurgery.evaluation.paired_statistics import Gain, paired


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
    def categories(self) -> tuple[str, ...]:
        """The prompts' categories, in order."""
        return tuple(dict.fromkeys(sample.prompt.category for sample in self.samples))

    def values(self, model: str, reward: str, category: str | None = None) -> list[float]:
        """Return the scores of a category's images, or of all."""
        scores = self.scores[model][reward]
        return [v for v, s in zip(scores, self.samples) if category in (None, s.prompt.category)]

    def gain(self, model: str, reward: str, category: str | None = None) -> Gain:
        """Return a model's gain over the base, paired image by image; images of one prompt are not independent."""
        before, after = (torch.tensor(self.values(m, reward, category)) for m in (self.models[0], model))
        return paired(before, after, self._texts(category))

    def mean(self, model: str, reward: str, category: str | None = None) -> Gain:
        """Return a model's mean, as a gain over zero."""
        values = torch.tensor(self.values(model, reward, category))
        return paired(torch.zeros_like(values), values, self._texts(category))

    def _texts(self, category: str | None) -> tuple[str, ...]:
        return tuple(s.prompt.text for s in self.samples if category in (None, s.prompt.category))

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict (JSON); undefined figures are None."""
        parts = {"all": None, **{c: c for c in self.categories}} if len(self.categories) > 1 else {"all": None}
        means = {
            label: {m: {r: self._mean(m, r, category) for r in self.rewards} for m in self.models}
            for label, category in parts.items()
        }
        gains = {
            label: {m: {r: _finite_or_none(asdict(self.gain(m, r, c))) for r in self.rewards} for m in self.models[1:]}
            for label, c in parts.items()
        }
        return {"means": means, **({"gains": gains} if len(self.models) > 1 else {}), "images": list(self._rows())}

    def _mean(self, model: str, reward: str, category: str | None) -> dict[str, Any]:
        mean = self.mean(model, reward, category)
        errors = {"standard_error": mean.se, "standard_error_by_prompt": mean.se_by_prompt}
        return _finite_or_none({"mean": mean.after, **errors, "images": len(self._texts(category))})

    def _rows(self) -> Iterator[dict[str, Any]]:
        for i, s in enumerate(self.samples):
            scores = {model: {r: self.scores[model][r][i] for r in self.rewards} for model in self.models}
            text = {"prompt": s.prompt.text, "category": s.prompt.category}
            yield {"number": s.number, "index": s.index, "seed": s.seed, **text, "scores": scores}


def _finite_or_none(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in figures.items()}


def category_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the table: all images first, then category by category."""
    categories = (None, *(comparison.categories if len(comparison.categories) > 1 else ()))
    for category in categories:
        for reward in comparison.rewards:
            base = comparison.mean(comparison.models[0], reward, category)
            cells = [f"{base.after:.4f}{_error(base)}"]
            for model in comparison.models[1:]:
                gain = comparison.gain(model, reward, category)
                cells += [f"{gain.after:.4f}", f"{gain.gain:+.4f}{_error(gain)}"]
            yield reward if category is None else f"{category}: {reward}", *cells


def _error(gain: Gain) -> str:
    """Format the standard error over prompts; a single prompt has none."""
    return "" if math.isnan(gain.se_by_prompt) else f" ± {gain.se_by_prompt:.4f}"


def column_names(comparison: Comparison) -> tuple[str, ...]:
    """Return the headings of `category_rows`."""
    return ("", comparison.models[0], *(head for model in comparison.models[1:] for head in (model, "gain")))


def title(comparison: Comparison) -> str:
    """Return the table's title."""
    numbers = {sample.number for sample in comparison.samples}
    paired_by = "; gains are paired image by image" if len(comparison.models) > 1 else ""
    return f"{len(comparison.samples)} images of {len(numbers)} prompts, ± standard errors over prompts{paired_by}"


def to_table(comparison: Comparison) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title(comparison))
    for heading in column_names(comparison):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for i, row in enumerate(category_rows(comparison)):
        table.add_row(*row, style="bold" if i < len(comparison.rewards) else "dim")
    return table


def to_markdown(comparison: Comparison) -> str:
    """Return the same table as Markdown."""
    lines = [column_names(comparison), tuple("---" for _ in column_names(comparison)), *category_rows(comparison)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{title(comparison)}\n\n{text}\n"


def to_csv(comparison: Comparison) -> str:
    """Return a CSV with one line for each image and model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "number", "index", "seed", "category", "prompt", *comparison.rewards])
    for model in comparison.models:
        for i, s in enumerate(comparison.samples):
            scores = [comparison.scores[model][reward][i] for reward in comparison.rewards]
            writer.writerow([model, s.number, s.index, s.seed, s.prompt.category, s.prompt.text, *scores])
    return text.getvalue()
