"""Statistics of the study: figures of a run, means over seeds with t intervals, paired differences of methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpmath import betainc

from trajsurgery.evaluation.held_out import HeldOutScores

Figures = Mapping[str, float]
"""{name of a figure: its mean over a run's held-out images}."""

NAMED = {"reward": "reward", "tiny:scorer_b": "scorer b", "tiny:scorer_c": "scorer c", "rules": "rules"}
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribute binding")


def mean_figures(scores: HeldOutScores) -> dict[str, float]:
    """Return means over the images: reward, further scorers, rules overall and by category, junk, diversity."""
    assert scores.correct is not None, "the embedded world has rules"
    assert scores.junk is not None, "and says what is junk"
    right = scores.correct.double()
    figures = {"reward": float(scores.reward.double().mean())}
    figures |= {name: float(values.double().mean()) for name, values in scores.metrics.items()}
    figures["rules"] = float(right.mean())
    for category in dict.fromkeys(scores.categories):
        figures[category] = float(right[[image_category == category for image_category in scores.categories]].mean())
    return figures | {"junk": float(scores.junk.double().mean()), "diversity": float(scores.apart["pixels"].nanmean())}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval (Student's t); the ends are NaN for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        ends = f"[{self.low:+.4f}, {self.high:+.4f}]" if self.seeds > 1 else "(one seed: no interval)"
        return f"{self.mean:+.4f} {ends}"

    @property
    def verdict(self) -> str:
        """One of "above 0", "below 0" and "not decided"."""
        if math.isnan(self.low) or self.low <= 0 <= self.high:
            return "not decided"
        return "above 0" if self.low > 0 else "below 0"

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict (JSON); the ends of a single seed are null."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its interval for independent values of one kind, one for each seed.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("an interval of no values: no seed is finished for all methods.")
    n, mean = len(values), statistics.fmean(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(freedom: int, outside: float = 0.05) -> float:
    """Return the t beyond which, on both sides together, Student's distribution has the share `outside`."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        tails = betainc(freedom / 2, 0.5, 0, freedom / (freedom + middle**2), regularized=True)
        low, high = (middle, high) if tails > outside else (low, middle)
    return high


Runs = Mapping[str, Mapping[int, Figures]]
"""{method: {seed: figures}}; `base` is the untuned model."""


def finished_seeds(runs: Runs, names: Iterable[str]) -> list[int]:
    """Return the seeds that are finished for all of these methods and the base."""
    return sorted(set.intersection(*(set(runs.get(name, {})) for name in (*names, "base"))))


def gain(runs: Runs, seeds: Sequence[int], name: str, figure: str, against: str = "base") -> Interval:
    """Return a method's figure less another's, seed by seed, with the same prompts and noise on both sides."""
    return interval([runs[name][seed][figure] - runs[against][seed][figure] for seed in seeds])


def resolution(runs: Runs, seeds: Sequence[int], names: Sequence[str], figure: str) -> float:
    """Return half of the 95% interval of the difference of any two of these, if all spread alike over seeds.

    It is taken from the residuals of the table of names and seeds without the means of its rows and columns, which have
    more degrees of freedom than a pair of names. NaN for a single seed.
    """
    table = [[runs[name][seed][figure] for seed in seeds] for name in names]
    rows, columns = [statistics.fmean(row) for row in table], [statistics.fmean(column) for column in zip(*table)]
    grand_mean, freedom = statistics.fmean(rows), (len(names) - 1) * (len(seeds) - 1)
    residuals = sum((x - r - c + grand_mean) ** 2 for row, r in zip(table, rows) for x, c in zip(row, columns))
    return t_quantile(freedom) * math.sqrt(2 * residuals / freedom / len(seeds)) if freedom else math.nan


def group_difference(
    runs: Runs, seeds: Sequence[int], these: Sequence[str], those: Sequence[str], figure: str
) -> Interval:
    """Return the mean of some methods less the mean of others, seed by seed."""

    def mean(names: Sequence[str], seed: int) -> float:
        return statistics.fmean(runs[name][seed][figure] for name in names)

    return interval([mean(these, seed) - mean(those, seed) for seed in seeds])


def summarise_runs(runs: Runs, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return {method: {figure: its interval, and the interval of its gain over the base}}, as plain dicts."""
    figures = list(next(iter(runs["base"].values())))
    return {
        name: {
            figure: {
                **interval([runs[name][seed][figure] for seed in seeds]).to_dict(),
                **({} if name == "base" else {"gain": gain(runs, seeds, name, figure).to_dict()}),
            }
            for figure in figures
        }
        for name in names
    }


def rank_methods(runs: Runs, seeds: Sequence[int], names: Sequence[str], figure: str) -> list[str]:
    """Return the methods by their mean of a figure, the best first."""
    return sorted(names, key=lambda name: -statistics.fmean(runs[name][seed][figure] for seed in seeds))
