"""metrics.jsonl: what happened in a run, a line each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trajsurgery.training.checkpoints.output_files import storage_errors, write_atomically
from trajsurgery.training.distributed import ranks

METRICS = "metrics.jsonl"


class Log:
    """metrics.jsonl: one line an iteration and validation round; the last line is the evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null. Of several ranks the first one writes.

        Raises:
            OutputError: the file system refuses.
        """
        if not ranks.is_main():
            return
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))

    def read(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def final(self) -> dict[str, Any] | None:
        """Return the evaluation at the end of the log, if there is one."""
        lines = self.read()
        return lines[-1] if lines and lines[-1]["kind"] == "evaluation" else None

    def cut(self, iteration: int, look: int = -1) -> None:
        """Drop the lines after an iteration and after a validation round, and a torn last line."""
        last = {"iteration": iteration, "look": look}
        records = [r for r in self.read() if r["kind"] in last and r["iteration"] <= last[r["kind"]]]
        text = "".join(map(_line, records))
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite_or_none(record), allow_nan=False) + "\n"


def finite_or_none(value: Any) -> Any:
    """Return a value of JSON with None for numbers that are not finite, which JSON can't hold."""
    if isinstance(value, Mapping):
        return {name: finite_or_none(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        items: Iterable[Any] = value
        return [finite_or_none(inner) for inner in items]
    return None if isinstance(value, float) and not math.isfinite(value) else value
