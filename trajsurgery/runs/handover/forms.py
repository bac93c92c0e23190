"""A run's weights as a diffusers folder, a merged transformer, or LoRA files for diffusers and ComfyUI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from trajsurgery.errors import RecipeError
from trajsurgery.runs.reports.run_folder import RunFolder
from trajsurgery.training.checkpoints.output_files import storage_errors
from trajsurgery.training.model.pipeline_loading import load_pipeline
from trajsurgery.training.settings import ModelSource

Form = Literal["diffusers", "merged", "lora", "comfyui"]
LORA_FILE, COMFYUI_FILE = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"
COMFYUI_READS = ("FluxTransformer2DModel", "SD3Transformer2DModel")
"""Transformers whose layers ComfyUI knows by diffusers' names."""


def export(run: RunFolder, folder: Path, form: Form, model: str | None = None) -> list[str]:
    """Write a run's averaged weights in a form; return the names of the files and folders written.

    Args:
        model: the base model, if it is not where the recipe says.

    Raises:
        RecipeError: the run has not ended, trained something else than the form takes, or its base model is missing.
        OutputError: the file system refuses.
    """
    trained = str(run.recipe.get("train", {}).get("what", "full"))
    check_form(run, folder, form, trained)
    source = ModelSource(model or run.recipe["model"], run.recipe.get("model_variant"), run.recipe.get("transformer"))
    partial = folder.with_name(f"{folder.name}.partial")
    writers: dict[str, Callable[[], list[str]]] = {
        "diffusers": lambda: _write_pipeline(tuned_pipeline(run, source, fuse=True), partial),
        "merged": lambda: _write_transformer(tuned_pipeline(run, source, fuse=True), partial),
        "lora": lambda: _write_lora(run, partial),
        "comfyui": lambda: _write_comfyui(run, source, partial),
    }
    try:
        with storage_errors(folder):
            partial.mkdir(parents=True, exist_ok=True)
            names = writers[form]()
            partial.replace(folder)  # whole or not at all
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return names


def check_form(run: RunFolder, folder: Path, form: Form, trained: str) -> None:
    """Raise unless a run can be written in a form to a folder.

    Raises:
        RecipeError: as `export`; the folder holds something.
    """
    if not (run.path / "transformer").is_dir() or run.evaluation is None:
        raise RecipeError(f"{run.path} is a run that has not ended: run its command again, which goes on with it.")
    if form in ("lora", "comfyui") and trained != "lora":
        raise RecipeError(
            f"--form {form}: {run.path} trained all weights, not adapters (train.what {trained}). Take --form "
            "diffusers or merged, or train with --train.what lora."
        )
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty: name another folder.")


def tuned_pipeline(run: RunFolder, source: ModelSource, fuse: bool = False) -> Any:
    """Return the base pipeline with the run's weights in its transformer.

    Args:
        fuse: adds adapters into the weights.

    Raises:
        RecipeError: the base model can't be loaded.
    """
    pipe = load_pipeline(source)
    if run.recipe.get("train", {}).get("what") == "lora":
        pipe.load_lora_weights(str(run.path / "transformer"), weight_name=LORA_FILE, local_files_only=True)
        if fuse:
            pipe.fuse_lora(components=["transformer"])
            pipe.unload_lora_weights()
    else:
        tuned = type(pipe.transformer).from_pretrained(run.path / "transformer", dtype=pipe.transformer.dtype)
        pipe.register_modules(transformer=tuned.to(pipe.transformer.device))
    return pipe


def _write_pipeline(pipe: Any, folder: Path) -> list[str]:
    pipe.save_pretrained(folder)
    return sorted(path.name for path in folder.iterdir())


def _write_transformer(pipe: Any, folder: Path) -> list[str]:
    """Write the transformer alone, in one file with its config."""
    pipe.transformer.save_pretrained(folder, max_shard_size="1000GB")
    return sorted(path.name for path in folder.iterdir())


def _write_lora(run: RunFolder, folder: Path) -> list[str]:
    """Write the adapters under diffusers' own names, with the run's settings in the file's metadata."""
    state, metadata = _adapters(run)
    _save(state, folder / LORA_FILE, {**metadata, **_settings(run)})
    return [LORA_FILE]


def _write_comfyui(run: RunFolder, source: ModelSource, folder: Path) -> list[str]:
    """Write the adapters with names such as lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight.

    Raises:
        RecipeError: ComfyUI knows this model's layers by other names.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    name = type(load_pipeline(source).transformer).__name__
    if name not in COMFYUI_READS:
        raise RecipeError(
            f"--form comfyui: of {name} ComfyUI knows the layers by other names than diffusers. Take --form merged or "
            f"lora. It is for {', '.join(COMFYUI_READS)}."
        )
    state, _ = _adapters(run)
    prefixed = {f"lora_{name}": value for name, value in state.items()}  # transformer. becomes lora_transformer_
    _save(convert_state_dict_to_kohya(prefixed), folder / COMFYUI_FILE, _settings(run))
    return [COMFYUI_FILE]


def _adapters(run: RunFolder) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the adapters that the run saved, and their file's metadata."""
    from safetensors import safe_open

    with safe_open(run.path / "transformer" / LORA_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _save(state: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    contiguous = {name: value.contiguous() for name, value in state.items()}
    save_file(contiguous, path, metadata={"format": "pt", **metadata})


def _settings(run: RunFolder) -> dict[str, str]:
    """Return what the file's metadata says of the run."""
    recipe, rank = run.recipe, str(run.recipe["train"]["rank"])
    about = {name: str(recipe[name]) for name in ("model", "reward", "prompts", "iterations")}
    method = json.dumps(recipe["method"])
    return {**about, "method": method, "rank": rank, "alpha": rank, "trajsurgery": version("trajsurgery")}
