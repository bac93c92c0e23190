"""Settings from a file, `--config FILE`: YAML, TOML or JSON with the fields of a recipe, read as flags are."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trajsurgery.errors import RecipeError, suggest
from trajsurgery.training.recipe import flat_settings

KINDS = ".yaml, .yml, .toml or .json"


def config_words(path: Path) -> list[str]:
    """Return a file's settings as the words of a command line: {"rollout": {"steps": 9}} is --rollout.steps 9.

    Types, ranges and choices are then checked as those of flags are.

    Raises:
        RecipeError: there is no such file, or it is no mapping of settings.
    """
    return [word for name, value in flat_settings(read_config(path)).items() for word in _words(name, value)]


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping that a file holds.

    Raises:
        RecipeError: as `config_words`.
    """
    readers: dict[str, Any] = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise RecipeError(f"--config {path}: a file of settings is {KINDS}.")
    try:
        settings = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"--config {path} can't be read: {error.strerror}.") from error
    except ValueError as error:  # of TOML, JSON and UTF-8; YAML's is turned into one
        raise RecipeError(f"--config {path} is no {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"--config {path}: it is a mapping such as `rollout: {{steps: 25}}`.")
    return settings  # pyright: ignore[reportUnknownVariableType]


def check_names(path: Path, recipe: Mapping[str, Any]) -> None:
    """Raise if a file names a setting that a recipe does not have.

    Args:
        recipe: the recipe's dict.

    Raises:
        RecipeError: which, and the nearest that there is.
    """
    known = flat_settings(recipe)
    for name in flat_settings(read_config(path)):
        if name not in known and name != "method":
            raise RecipeError(f"--config {path}: there is no setting {name!r}.{suggest(name, known)}")


def _words(name: str, value: Any) -> list[str]:
    if name == "method.name":  # of a recipe's dict
        name = "method"
    if isinstance(value, bool):
        *parts, last = name.split(".")
        return ["--" + ".".join([*parts, last if value else f"no-{last}"])]
    values: list[Any] = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
