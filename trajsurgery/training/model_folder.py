"""Check a diffusers folder for missing files, by file names and index files. Nothing is loaded or downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajsurgery.rewards.weight_files import cached_file

INDEX = "model_index.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece*.model")


def model_problem(model: str) -> str | None:
    """Return what a local folder or a cached hub snapshot is missing and how to fix it; None if it is complete."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            return f"{model} is a folder without {INDEX}: --model takes what diffusers' save_pretrained wrote."
        mend = f"Write it again with diffusers' save_pretrained, or `hf download HUB-ID --local-dir {model}`"
    else:
        if folder.is_absolute() or model.startswith("."):
            return f"there is no folder {model}: --model takes what diffusers' save_pretrained wrote, or a hub id."
        cached = cached_snapshot(model)
        if cached is None:
            return (
                f"no weights: {model} is neither a local folder nor in the Hugging Face cache, and nothing is fetched "
                f"here. Fetch it with `hf download {model}` (its licence may have to be accepted there first), or pass "
                "--model FOLDER."
            )
        folder, mend = cached, f"Nothing is fetched here: `hf download {model}` fetches the rest"
    missing = missing_parts(folder)
    return f"{model} is there in part: {'; '.join(missing)}. {mend}." if missing else None


def cached_snapshot(repo: str) -> Path | None:
    """Return the folder of a hub id in the local Hugging Face cache. Opens no connection."""
    file = cached_file(repo, INDEX)
    return file and file.parent


def missing_parts(folder: Path) -> list[str]:
    """Return a line for each component of `model_index.json` that is missing or incomplete.

    Optional components such as safety checkers are null in the index and are not checked.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{INDEX} can't be read ({error})"]
    problems: list[str] = []
    if "_class_name" in index and "transformer" not in index:
        problems.append(f"no transformer, which is what trains: it is a {index['_class_name']}")
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry:
            missing = _part_problem(folder / name, str(entry[1]))
            problems += [f"{name}/ ({entry[1]}): {missing}"] if missing else []
    return problems


def _part_problem(part: Path, kind: str) -> str | None:
    """Return what is missing in a component's folder."""
    if not part.is_dir():
        return "no such folder"
    if "Tokenizer" in kind:
        return None if _any(part, _VOCABULARIES) else f"no vocabulary ({', '.join(_VOCABULARIES[:4])})"
    if "Scheduler" in kind:
        return None if (part / "scheduler_config.json").is_file() else "no scheduler_config.json"
    if not (part / "config.json").is_file():  # processors and feature extractors have files of their own
        return None if _any(part, ("*config.json",)) else "no config.json"
    shards = [shard for path in part.glob("*.index.json") for shard in _shards(path) if not (part / shard).is_file()]
    if shards:
        return f"no {', '.join(shards)}"
    return None if _any(part, _WEIGHTS) else "no weights (*.safetensors)"


def _any(part: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in part.glob(pattern))


def _shards(index: Path) -> list[str]:
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(weight_map.values()))
