"""What a run left in its folder, read for reports. Parts that an older or interrupted run lacks are empty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trajsurgery.errors import RecipeError
from trajsurgery.runs.reports.saved_pictures import SAMPLES
from trajsurgery.training.checkpoints.checkpoint import SHEETS
from trajsurgery.training.checkpoints.run_log import METRICS, Log


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path
    records: Sequence[dict[str, Any]]
    """The lines of metrics.jsonl."""
    recipe: dict[str, Any]
    info: dict[str, Any]
    """run.json: command, versions, machine."""
    samples: Sequence[dict[str, Any]]
    """samples.json: held-out pairs."""
    sheets: Sequence[dict[str, Any]]
    """sheet.json of each contact sheet, with "folder"."""
    plan: str
    """The first plan in arrow notation, and its closed form."""

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read a folder.

        Raises:
            RecipeError: it is no folder of a run.
        """
        if not (path / METRICS).is_file():
            what = "it has no metrics.jsonl" if path.is_dir() else "there is no such folder"
            raise RecipeError(f"{path} is no run's output folder: {what}. Name the --output of a training command.")
        sheets = [{**_json(file), "folder": file.parent} for file in sorted((path / SHEETS).glob("*/sheet.json"))]
        plan = path / "plan.txt"
        return cls(
            path,
            Log(path / METRICS).read(),
            _json(path / "recipe.json"),
            _json(path / "run.json"),
            _json(path / SAMPLES / "samples.json") or [],
            sheets,
            plan.read_text(encoding="utf-8") if plan.exists() else "",
        )

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def iterations(self) -> list[dict[str, Any]]:
        """The iterations' records."""
        return self.of_kind("iteration")

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The closing evaluation, if the run has ended."""
        records = self.of_kind("evaluation")
        return records[-1] if records else None

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.recipe.get("method", {}).get("name", "method not recorded"))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name


def _json(path: Path) -> Any:
    """Return what a file holds, numbers that are not finite as None; {} if there is none.

    Raises:
        RecipeError: it is no JSON.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise RecipeError(f"{path} is no JSON ({error}): remove it, or restore it from the run.") from error
