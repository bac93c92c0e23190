"""The models that an evaluation compares: a base, and what was tuned from it. Found by name, before any is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trajsurgery.errors import RecipeError
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.rewards.weights import cached
from trajsurgery.training import components
from trajsurgery.training.preflight import lacking_model
from trajsurgery.training.recipe import EMBEDDED, Recipe
from trajsurgery.training.settings import Rollout

BASE = "base"
LORA = "pytorch_lora_weights.safetensors"
"""What `save_lora_weights` writes."""

PLACES = 64
"""So many places of a weight file are looked at to tell it from another."""


@dataclass(frozen=True)
class ModelVariant:
    """A model of an evaluation."""

    name: str
    """Of its column, and of its folder of images."""
    kind: Literal["model", "transformer", "adapters"]
    where: str
    """A name or a path: of a whole model, of a transformer alone, or of adapters for the base."""

    def load(self, base: str, precision: Literal["float32", "bfloat16"]) -> Any:
        """Its pipeline, silent, in eval mode."""
        with components.quiet():
            pipe = components.pipeline(self.where if self.kind == "model" else base)
            if self.kind == "transformer":
                own = type(pipe.transformer).from_pretrained(self.where, torch_dtype=pipe.transformer.dtype)
                pipe.register_modules(transformer=own.to(pipe.transformer.device))
            elif self.kind == "adapters":
                file = _adapters(Path(self.where)) or Path(self.where) / LORA
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
        return components.frozen(pipe, Recipe(rollout=Rollout(precision=precision)))

    def fingerprint(self) -> str | None:
        """A hash that changes if the files do; None for what is not in a folder of its own."""
        path = Path(self.where)
        if self.where in EMBEDDED or not path.exists():
            return None
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        found = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            found.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as data:
                for i in range(PLACES):
                    data.seek(size * i // PLACES)
                    found.update(data.read(2**16))
        return found.hexdigest()


def versions(given: Evaluate) -> tuple[ModelVariant, ...]:
    """The base, then what was tuned, in the order asked for.

    Raises:
        RecipeError: what is not there, all of it at once; two of one name.
    """
    found = [ModelVariant(BASE, "model", base(given)), *map(_tuned, given.tuned)]
    missing = [line for version in found if (line := _lacking(version))]
    names = [version.name for version in found]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        missing.append(f"two models are called {', '.join(double)}: the name is that of the folder; rename one.")
    if missing:
        raise RecipeError("\n".join(["this evaluation can't run here:", *(f"  - {line}" for line in missing)]))
    return tuple(found)


def base(given: Evaluate) -> str:
    """The base model: as asked, else that of the first run, else tiny."""
    return given.model or next((str(r["model"]) for r in _runs(given.tuned)), "tiny")


def run_of(given: Evaluate) -> dict[str, Any]:
    """The recipe of the first run among what was tuned; {} if there is none."""
    return next(_runs(given.tuned), {})


def _runs(tuned: Iterable[str]) -> Iterator[dict[str, Any]]:
    for where in tuned:
        for folder in (Path(where), Path(where).parent):
            if (folder / "recipe.json").is_file() and (folder / "transformer").is_dir():
                yield json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
                break


def _tuned(where: str) -> ModelVariant:
    path = Path(where)
    if path.is_dir() and (path / "transformer").is_dir() and not (path / "model_index.json").is_file():
        return _tuned(str(path / "transformer"))
    name = (path.parent if path.name == "transformer" else path).name.removesuffix(".safetensors") or where
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    if _adapters(path) is not None or (not path.exists() and cached(where, LORA)):
        return ModelVariant(name, "adapters", where)
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        return ModelVariant(name, "transformer", where)
    return ModelVariant(name, "model", where)


def _adapters(path: Path) -> Path | None:
    """The file of adapters that a path is or holds: one of weights without the configuration of a model beside it."""
    if path.is_file():
        return path
    found = [path / LORA] if (path / LORA).is_file() else sorted(path.glob("*.safetensors"))
    alone = not (path / "config.json").is_file() and not (path / "model_index.json").is_file()
    return found[0] if len(found) == 1 and alone else None


def _lacking(version: ModelVariant) -> str | None:
    path = Path(version.where)
    if version.where == "tiny:wan":
        return "tiny:wan makes videos: evaluate compares images."
    if version.kind == "transformer" and not any(path.glob("*.safetensors")):
        return f"{path} has a config.json, but no weights (*.safetensors)."
    if version.kind != "model":
        return None
    if version.name != BASE and path.is_dir() and not (path / "model_index.json").is_file():
        unfinished = " It is a run that is not finished." if (path / "checkpoint.pt").is_file() else ""
        return (
            f"{path} holds nothing tuned: no transformer/, no config.json, no {LORA}, no model_index.json.{unfinished}"
        )
    if version.name != BASE and not path.exists() and version.where not in EMBEDDED:
        said = lacking_model(version.where)
        return said and said.replace("--model FOLDER", "--tuned FOLDER")
    return lacking_model(version.where)
