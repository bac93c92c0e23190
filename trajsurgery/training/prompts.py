"""Read prompt files: text, CSV, JSON, JSONL and parquet, including the layouts of HPDv2, MJHQ-30K and GenEval."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trajsurgery.errors import RecipeError

TEXT, CATEGORY = ("prompt", "text", "caption"), ("category", "tag", "style")
"""The names of a row's prompt and category, the first that it has; capitals do not count."""

PAIRS = ("human_preference", "rank")
"""HPDv2's train.json and test.json have one of these; each prompt stands there once for each pair of images."""

ALL = "all"
"""The category of prompts without one."""

KINDS = ".txt (one a line), .csv or .tsv (with a column `prompt`), .jsonl, .json, .parquet, or a folder of such files"
"""For error messages."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its category."""

    text: str
    category: str = ALL
    record: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The row of the file, for evaluators that read it back (GenEval's `include`)."""


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Return the prompts of a file in its order, or of all prompt files in a folder, by file name.

    - Text, with any other ending than these: one prompt a line.
    - CSV and TSV: a header with a column `prompt` (or `text`, `caption`) and optionally `category` (or `tag`, `style`);
      fields are separated by commas, semicolons or tabs, whichever the header has most of.
    - JSONL: a string a line, or an object with these names, as in GenEval's evaluation_metadata.jsonl.
    - JSON: a list of strings (HPDv2's benchmark) or objects (HPDv2's train.json and test.json; the pairs of a prompt
      count once) whose default category is the file's name; {style: [...]}; or {id: object} (MJHQ-30K's
      meta_data.json).
    - Parquet: columns with these names. It needs pyarrow, the extra `parquet`.

    Raises:
        RecipeError: no such file, no prompts in it, a row without a prompt or with control characters, or another
            format.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*_READERS, ".txt"))
        if not files:
            raise RecipeError(f"{path} is a folder without prompts: there is no file that is {KINDS}.")
        return tuple(prompt for file in files for prompt in read_prompts(file))
    suffix = path.suffix.lower()
    if not path.is_file():
        raise RecipeError(f"there is no file {str(path)!r}: prompts are tiny, or {KINDS}.")
    try:
        prompts = tuple(_READERS.get(suffix, _read_lines)(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{str(path)!r} is no text in UTF-8 ({error}): prompts are {KINDS}.") from error
    if not prompts:
        raise RecipeError(f"{str(path)!r} holds no prompt: write one a line.")
    return prompts


def repetitions(source: str, texts: Sequence[str]) -> str | None:
    """Return a line about prompts that occur again in a file; None if each occurs once."""
    again = len(texts) - len(set(texts))
    if not again:
        return None
    return f"{source}: {again} of {len(texts)} prompts repeat others; each is drawn and counted as often as it occurs."


def _read_lines(path: Path) -> Iterator[Prompt]:
    lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
    return (Prompt(_check_characters(path, f"line {i}", line.strip())) for i, line in lines if line.strip())


def _read_table(path: Path) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        table = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
        _check_columns(path, [*(table.fieldnames or ())])
        rows = list[tuple[str, Any]]()
        try:
            for row in table:
                place = f"line {table.line_num}"
                if None in row:
                    raise RecipeError(
                        f"{str(path)!r}: {place} has more fields than the header: put a prompt that contains "
                        f"{table.reader.dialect.delimiter!r} in quotes."
                    )
                rows.append((place, row))
        except csv.Error as error:
            raise RecipeError(f"{str(path)!r}: it can't be read near line {table.line_num} ({error}).") from error
    return _prompts_of_rows(rows, path)


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
    return _prompts_of_rows(
        ((f"line {i}", _parse_json(path, line, f"line {i}")) for i, line in lines if line.strip()), path
    )


def _read_json(path: Path) -> Iterator[Prompt]:
    data = _parse_json(path, path.read_text(encoding="utf-8-sig"), "it")
    if isinstance(data, Mapping) and all(isinstance(rows, list) for rows in data.values()):
        groups = [(str(style), rows) for style, rows in data.items()]
    elif isinstance(data, Mapping):
        return _prompts_of_rows(((f"{name!r}", row) for name, row in data.items()), path)
    elif isinstance(data, list):
        groups = [(path.stem, data)]
    else:
        raise RecipeError(f"{str(path)!r} holds {type(data).__name__}: JSON prompts are a list or an object.")
    return (
        prompt
        for style, rows in groups
        for prompt in _prompts_of_rows(((f"row {i}", r) for i, r in enumerate(rows)), path, style)
    )


def _read_parquet(path: Path) -> Iterator[Prompt]:
    if find_spec("pyarrow") is None:
        raise RecipeError(
            f"{str(path)!r} is parquet, which pyarrow reads, and pyarrow is not installed here: install the extra, "
            "`pip install 'trajsurgery[parquet]'`, or write the prompts to a .jsonl file."
        )
    from pyarrow import ArrowInvalid, parquet

    try:
        file: Any = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise RecipeError(f"{str(path)!r} is no parquet file ({error}).") from error
    names: list[str] = file.schema_arrow.names
    columns = [name for name in names if name.lower() in (*TEXT, *CATEGORY, *PAIRS)]  # never the pictures beside them
    _check_columns(path, names)
    rows: list[Any] = file.read(columns=columns).to_pylist()
    return _prompts_of_rows(((f"row {i}", row) for i, row in enumerate(rows)), path)


_READERS = {
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if not any(name.lower() in TEXT for name in names):
        raise RecipeError(f"{str(path)!r} has no column {', '.join(TEXT)}; it has {', '.join(names)}.")


def _check_characters(path: Path, where: str, text: str) -> str:
    """Return the text, or raise if it has characters that no prompt has: tokenizers read them, and nobody sees them."""
    for i, c in enumerate(text):
        if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r") or c == "\ufeff":
            raise RecipeError(
                f"{str(path)!r}: {where} has the control character U+{ord(c):04X} after {text[max(0, i - 20) : i]!r}. "
                "Remove it, or save the file as UTF-8 text."
            )
    return text


def _parse_json(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{str(path)!r}: {where} is not JSON ({error}).") from error


def _prompts_of_rows(rows: Iterable[tuple[str, Any]], path: Path, style: str = ALL) -> Iterator[Prompt]:
    """Yield the prompts of (position, row) pairs."""
    paired: set[str] = set()
    for where, row in rows:
        prompt = _prompt_of_row(row, path, where, style)
        if prompt.record is not None and any(name in prompt.record for name in PAIRS):
            if prompt.text in paired:
                continue
            paired.add(prompt.text)
        yield prompt


def _prompt_of_row(row: Any, path: Path, where: str, style: str) -> Prompt:
    if isinstance(row, str) and row.strip():
        return Prompt(_check_characters(path, where, row.strip()), style)
    record: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    named = {str(name).lower(): value for name, value in record.items()}
    text = next((named[name] for name in TEXT if name in named), None)
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(
            f"{str(path)!r}: {where} is {json.dumps(row, default=str)[:80]}, which has no prompt: it is a text, or an "
            f"object with one under {', '.join(TEXT)}."
        )
    category = next((named[name] for name in CATEGORY if named.get(name) not in (None, "")), None)
    text = _check_characters(path, where, text.strip())
    return Prompt(text, style if category is None else str(category), record)
