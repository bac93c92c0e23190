"""The scores of several models on the same prompts and noise: means, paired gains, and how they are told."""

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
    """What an evaluation found."""

    models: tuple[str, ...]
    """The first is the base that the others are compared with."""
    rewards: tuple[str, ...]
    asked: Sequence[Sample]
    scores: Mapping[str, Mapping[str, Sequence[float]]]
    """By model and reward, image by image."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Those of the prompts, in their order."""
        return tuple(dict.fromkeys(sample.prompt.category for sample in self.asked))

    def values(self, model: str, reward: str, category: str | None = None) -> list[float]:
        """The scores of a category's images, or of all."""
        found = self.scores[model][reward]
        return [v for v, s in zip(found, self.asked) if category in (None, s.prompt.category)]

    def gain(self, model: str, reward: str, category: str | None = None) -> Gain:
        """Of a model over the base, paired image by image; images of one prompt are no independent ones."""
        before, after = (torch.tensor(self.values(m, reward, category)) for m in (self.models[0], model))
        return paired(before, after, self._texts(category))

    def mean(self, model: str, reward: str, category: str | None = None) -> Gain:
        """Of a model alone: over nothing."""
        values = torch.tensor(self.values(model, reward, category))
        return paired(torch.zeros_like(values), values, self._texts(category))

    def _texts(self, category: str | None) -> tuple[str, ...]:
        return tuple(s.prompt.text for s in self.asked if category in (None, s.prompt.category))

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (JSON); what is not defined is None."""
        parts = {"all": None, **{c: c for c in self.categories}} if len(self.categories) > 1 else {"all": None}
        means = {
            said: {m: {r: self._mean(m, r, category) for r in self.rewards} for m in self.models}
            for said, category in parts.items()
        }
        gains = {
            said: {m: {r: _plain(asdict(self.gain(m, r, c))) for r in self.rewards} for m in self.models[1:]}
            for said, c in parts.items()
        }
        return {"means": means, **({"gains": gains} if len(self.models) > 1 else {}), "images": list(self._rows())}

    def _mean(self, model: str, reward: str, category: str | None) -> dict[str, Any]:
        found = self.mean(model, reward, category)
        errors = {"standard_error": found.se, "standard_error_by_prompt": found.se_by_prompt}
        return _plain({"mean": found.after, **errors, "images": len(self._texts(category))})

    def _rows(self) -> Iterator[dict[str, Any]]:
        for i, s in enumerate(self.asked):
            scores = {model: {r: self.scores[model][r][i] for r in self.rewards} for model in self.models}
            text = {"prompt": s.prompt.text, "category": s.prompt.category}
            yield {"number": s.number, "index": s.index, "seed": s.seed, **text, "scores": scores}


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}


def rows(standing: Comparison) -> Iterator[tuple[str, ...]]:
    """The cells of the table: all images first, then category by category."""
    categories = (None, *(standing.categories if len(standing.categories) > 1 else ()))
    for category in categories:
        for reward in standing.rewards:
            base = standing.mean(standing.models[0], reward, category)
            cells = [f"{base.after:.4f}{_error(base)}"]
            for model in standing.models[1:]:
                gain = standing.gain(model, reward, category)
                cells += [f"{gain.after:.4f}", f"{gain.gain:+.4f}{_error(gain)}"]
            yield reward if category is None else f"{category}: {reward}", *cells


def _error(gain: Gain) -> str:
    """Over prompts; a single prompt has none."""
    return "" if math.isnan(gain.se_by_prompt) else f" ± {gain.se_by_prompt:.4f}"


def heads(standing: Comparison) -> tuple[str, ...]:
    """The headings of `rows`."""
    return ("", standing.models[0], *(head for model in standing.models[1:] for head in (model, "gain")))


def told(standing: Comparison) -> str:
    """What the table's figures are."""
    numbers = {sample.number for sample in standing.asked}
    paired_by = "; gains are paired image by image" if len(standing.models) > 1 else ""
    return f"{len(standing.asked)} images of {len(numbers)} prompts, ± standard errors over prompts{paired_by}"


def table(standing: Comparison) -> Table:
    """For the terminal."""
    found = Table(title=told(standing))
    for heading in heads(standing):
        found.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for i, row in enumerate(rows(standing)):
        found.add_row(*row, style="bold" if i < len(standing.rewards) else "dim")
    return found


def markdown(standing: Comparison) -> str:
    """The same table in a file."""
    lines = [heads(standing), tuple("---" for _ in heads(standing)), *rows(standing)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{told(standing)}\n\n{text}\n"


def csv_of(standing: Comparison) -> str:
    """A line an image and model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "number", "index", "seed", "category", "prompt", *standing.rewards])
    for model in standing.models:
        for i, s in enumerate(standing.asked):
            found = [standing.scores[model][reward][i] for reward in standing.rewards]
            writer.writerow([model, s.number, s.index, s.seed, s.prompt.category, s.prompt.text, *found])
    return text.getvalue()
