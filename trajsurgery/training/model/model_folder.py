"""Check a diffusers folder for missing files, by file names, index files and headers. No tensor is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trajsurgery.errors import suggest
from trajsurgery.rewards.weight_files import cached_file, is_local
from trajsurgery.training.settings import ModelSource

INDEX = "model_index.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_SCALES = r"(^|[._])(scaled_fp8|scale_weight|weight_scale)$"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece*.model")


def model_problem(source: ModelSource, known: Iterable[str] = ()) -> str | None:
    """Return what a local folder or a cached hub snapshot is missing and how to fix it; None if it is complete.

    Args:
        known: models by name, of which the nearest one is suggested.
    """
    model, folder = source.name, Path(source.name)
    if folder.is_file():
        return (
            f"{model} is a file, and --model is a whole pipeline: pass --transformer {model}, and as --model the "
            "folder or hub id whose text encoders, VAE and scheduler go with it, such as black-forest-labs/FLUX.1-dev."
        )
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            return f"{model} is a folder without {INDEX}: --model takes what diffusers' save_pretrained wrote."
    elif is_local(model):
        return f"there is no folder {model}: --model takes what diffusers' save_pretrained wrote, or a hub id."
    elif (cached := cached_snapshot(model)) is not None:
        folder = cached
    else:
        fetch = f"Fetch it with `hf download {model}` (its licence may have to be accepted there first), or pass"
        return (
            f"no weights: {model} is neither a local folder nor in the Hugging Face cache, and nothing is fetched here."
            f"{suggest(model, known)} {fetch if '/' in model else 'Pass'} --model FOLDER."
        )
    if source.transformer and (problem := _transformer_problem(source.transformer, source.variant)):
        return f"{problem}."
    missing = missing_parts(folder, source)
    return f"{model} is there in part: {'; '.join(missing)}. {advice(model)}." if missing else None


def advice(model: str) -> str:
    """Return how to get whole files of a model: a path has to be written again, a hub id fetched."""
    if is_local(model) or Path(model).exists():
        return "Write it again with diffusers' save_pretrained, or copy it again from where it is whole"
    return f"Nothing is fetched here: `hf download {model}` fetches the rest"


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """Return a component's weight files as diffusers chooses them: those of the variant, else those without one."""
    files = sorted(path for pattern in _WEIGHTS for path in part.glob(pattern))
    return [f for f in files if _variant(f) == variant] or [f for f in files if _variant(f) is None]


def _variant(file: Path) -> str | None:
    """Return fp16 of model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and ...index.fp16.json."""
    named = re.search(r"\.index\.(\w+)\.json$|\.(?!index)(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", file.name)
    return named and (named[1] or named[2])


def chosen_variant(part: Path, variant: str | None) -> str | None:
    """Return the variant that a component has files of: the given one, else None."""
    return variant if any(_variant(file) == variant for file in weight_files(part, variant)) else None


def _transformer_problem(where: str, variant: str | None) -> str | None:
    path = Path(where)
    if path.is_dir():
        missing = _part_problem(path, "transformer", variant)
        return missing and f"--transformer {where}: {missing}"
    if not path.is_file():
        return f"there is no --transformer {where}"
    # scales beside the weights, which `from_single_file` would leave out
    if path.suffix == ".gguf" or any(re.search(_SCALES, name) for name in shapes(path)):
        return f"--transformer {where} is quantised: take the file in bfloat16, and --train.base int8 or nf4 for less"
    return None


def shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of a safetensors file's tensors by name, from its header; {} if it has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # another kind of file, or a damaged one, which `load_pipeline` refuses
        return {}


def cached_snapshot(repo: str) -> Path | None:
    """Return the folder of a hub id in the local Hugging Face cache. Opens no connection."""
    file = cached_file(repo, INDEX)
    return file and file.parent


def missing_parts(folder: Path, source: ModelSource | None = None) -> list[str]:
    """Return a line for each component of `model_index.json` that is missing or incomplete.

    Optional components such as safety checkers are null in the index and are not checked.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{INDEX} can't be read ({error})"]
    problems: list[str] = []
    variant = source and source.variant
    if variant and not any(_variant(file) == variant for pattern in _WEIGHTS for file in folder.glob(f"*/{pattern}")):
        problems.append(f"no weight file of the variant {variant}, such as model.{variant}.safetensors")
    if "_class_name" in index and "transformer" not in index:
        problems.append(f"no transformer, which is what trains: it is a {index['_class_name']}")
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry:
            replaced = name == "transformer" and source is not None and source.transformer is not None
            missing = _part_problem(folder / name, str(entry[1]), variant, needs_weights=not replaced)
            problems += [f"{name}/ ({entry[1]}): {missing}"] if missing else []
    return problems


def _part_problem(part: Path, kind: str, variant: str | None, needs_weights: bool = True) -> str | None:
    """Return what is missing in a component's folder."""
    if not part.is_dir():
        return "no such folder"
    if "Tokenizer" in kind:
        return None if _any(part, _VOCABULARIES) else f"no vocabulary ({', '.join(_VOCABULARIES[:4])})"
    if "Scheduler" in kind:
        return None if (part / "scheduler_config.json").is_file() else "no scheduler_config.json"
    if not (part / "config.json").is_file():  # processors and feature extractors have files of their own
        return None if _any(part, ("*config.json",)) else "no config.json"
    if not needs_weights:
        return None
    indices = [path for path in part.glob("*.index*.json") if _variant(path) in (variant, None)]
    shards = [shard for path in indices for shard in _shards(path) if not (part / shard).is_file()]
    if shards:
        return f"no {', '.join(shards)}"
    if weight_files(part, variant):
        return None
    others = sorted({name for pattern in _WEIGHTS for path in part.glob(pattern) if (name := _variant(path))})
    mend = f", but some of the variant {others[0]}: pass --model-variant {others[0]}" if others else ""
    return f"no weights (*.safetensors){mend}"


def _any(part: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in part.glob(pattern))


def _shards(index: Path) -> list[str]:
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(weight_map.values()))
