"""The models that an evaluation compares: a base, and models tuned from it. All are checked before one is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trajsurgery.errors import RecipeError
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.rewards.weight_files import cached_file
from trajsurgery.training import components
from trajsurgery.training.checkpoints.checkpoint import CHECKPOINTS
from trajsurgery.training.checks.preflight import model_problem
from trajsurgery.training.distributed import ranks
from trajsurgery.training.recipe import EMBEDDED, Recipe
from trajsurgery.training.settings import ModelSource, Rollout

BASE = "base"
LORA = "pytorch_lora_weights.safetensors"
"""The file that `save_lora_weights` writes."""

PLACES = 64
"""So many places of a weight file are hashed."""


@dataclass(frozen=True)
class ModelVariant:
    """One model of an evaluation."""

    name: str
    """Heading of its column and name of its image folder."""
    kind: Literal["model", "transformer", "adapters"]
    where: str
    """Name or path of a whole model, of a transformer alone, or of adapters for the base."""

    def load(self, base: ModelSource, rollout: Rollout, device: str = "auto") -> Any:
        """Load its pipeline, in eval mode and without progress bars.

        Args:
            rollout: its precision, and whether blocks are compiled.
        """
        with components.quiet():
            pipe = components.load_pipeline(
                self.where if self.kind == "model" and self.name != BASE else base, ranks.choose_device(device)
            )
            if self.kind == "transformer":
                transformer = type(pipe.transformer).from_pretrained(self.where, torch_dtype=pipe.transformer.dtype)
                pipe.register_modules(transformer=transformer.to(pipe.transformer.device))
            elif self.kind == "adapters":
                file = _adapter_file(Path(self.where)) or Path(self.where) / LORA
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
        return components.prepare_pipeline(pipe, Recipe(rollout=rollout, device=device))

    def fingerprint(self) -> str | None:
        """Return a hash that changes if the weight files do; None for embedded models and hub ids."""
        path = Path(self.where)
        if self.where in EMBEDDED or not path.exists():
            return None
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as data:
                for i in range(PLACES):
                    data.seek(size * i // PLACES)
                    digest.update(data.read(2**16))
        return digest.hexdigest()


def find_variants(options: Evaluate) -> tuple[ModelVariant, ...]:
    """Return the base, then the tuned models in the order of the options.

    Raises:
        RecipeError: all that is missing, or two models with one name.
    """
    variants = [ModelVariant(BASE, "model", base_model(options)), *map(_tuned_variant, options.tuned)]
    problems = [problem for variant in variants if (problem := _variant_problem(variant, base_source(options)))]
    names = [variant.name for variant in variants]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        problems.append(f"two models are called {', '.join(duplicates)}: the name is that of the folder; rename one.")
    if problems:
        raise RecipeError("\n".join(["this evaluation can't run here:", *(f"  - {problem}" for problem in problems)]))
    return tuple(variants)


def base_model(options: Evaluate) -> str:
    """Return the base model: from the options, else that of the first run, else tiny."""
    return options.model or run_recipe(options).get("model", "tiny")


def base_source(options: Evaluate) -> ModelSource:
    """Return where the base model's files are: as the options say, else as the first run does."""
    run, model = run_recipe(options), base_model(options)
    run = run if run.get("model") == model else {}
    variant = options.model_variant or run.get("model_variant")
    return ModelSource(model, variant, options.transformer or run.get("transformer"))


def run_recipe(options: Evaluate) -> dict[str, Any]:
    """Return the recipe of the first run among the tuned models; {} if there is none."""
    for where in options.tuned:
        for folder in (Path(where), Path(where).parent):
            if (folder / "recipe.json").is_file() and (folder / "transformer").is_dir():
                return json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    return {}


def _tuned_variant(where: str) -> ModelVariant:
    path = Path(where)
    if path.is_dir() and (path / "transformer").is_dir() and not (path / "model_index.json").is_file():
        return _tuned_variant(str(path / "transformer"))
    name = (path.parent if path.name == "transformer" else path).name.removesuffix(".safetensors") or where
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    if _adapter_file(path) is not None or (not path.exists() and cached_file(where, LORA)):
        return ModelVariant(name, "adapters", where)
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        return ModelVariant(name, "transformer", where)
    return ModelVariant(name, "model", where)


def _adapter_file(path: Path) -> Path | None:
    """Return the adapter file that a path is or holds: weights without a model configuration beside them."""
    if path.is_file():
        return path
    files = [path / LORA] if (path / LORA).is_file() else sorted(path.glob("*.safetensors"))
    alone = not (path / "config.json").is_file() and not (path / "model_index.json").is_file()
    return files[0] if len(files) == 1 and alone else None


def _variant_problem(variant: ModelVariant, base: ModelSource) -> str | None:
    path = Path(variant.where)
    if variant.name == BASE and variant.where != "tiny:wan":
        return model_problem(base)
    if variant.where == "tiny:wan":
        return "tiny:wan makes videos: evaluate compares images."
    if variant.kind == "transformer" and not any(path.glob("*.safetensors")):
        return f"{path} has a config.json, but no weights (*.safetensors)."
    if variant.kind != "model":
        return None
    if path.is_dir() and not (path / "model_index.json").is_file():
        unfinished = " It is a run that is not finished." if (path / CHECKPOINTS).is_dir() else ""
        return (
            f"{path} holds nothing tuned: no transformer/, no config.json, no {LORA}, no model_index.json.{unfinished}"
        )
    problem = model_problem(ModelSource(variant.where))
    return problem and problem.replace("--model FOLDER", "--tuned FOLDER")
