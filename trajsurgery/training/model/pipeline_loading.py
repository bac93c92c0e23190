"""Load a pipeline from an embedded model, a folder, the local cache, or a single file of its transformer."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from trajsurgery.errors import RecipeError
from trajsurgery.training.model import precision
from trajsurgery.training.model.model_folder import advice, cached_snapshot, chosen_variant, model_problem
from trajsurgery.training.settings import ModelSource, Trained


def load_pipeline(model: str | ModelSource, device: torch.device | str = "cpu", trained: Trained | None = None) -> Any:
    """Load the pipeline that a recipe names, on the CPU, in float32; for a GPU with text encoders in bfloat16.

    Args:
        model: its source; a text is its name.
        trained: quantises the transformer, if it says so.

    Raises:
        RecipeError: a part is missing or can't be read.
    """
    source = ModelSource(model) if isinstance(model, str) else model
    world, _, name = source.name.partition(":")
    config: Any = precision.quantisation(trained) if trained else None
    if world == "tiny":
        if config is not None:
            raise RecipeError(
                f"--train.base int8 and nf4 need a folder or hub id as --model; {source.name} is embedded."
            )
        return import_module("trajsurgery.tiny").pipeline(name or "flux")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if missing := model_problem(source):  # of a missing tokenizer transformers makes an empty one
        raise RecipeError(missing)
    dtypes = _component_dtypes(torch.device(device)) | ({"transformer": torch.bfloat16} if config else {})
    options: dict[str, Any] = {"variant": source.variant, "local_files_only": True}
    if source.transformer is None:
        options["quantization_config"] = config
    else:
        quantised = config and config.quant_mapping["transformer"]
        dtype = dtypes.get("transformer", dtypes["default"])
        options["transformer"] = _load_transformer(source, Path(source.transformer), dtype, quantised)
    try:
        return DiffusionPipeline.from_pretrained(source.name, dtype=dtypes, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source.name} can't be loaded: {error} {advice(source.name)}.") from error


def _load_transformer(source: ModelSource, where: Path, dtype: torch.dtype, quantised: Any) -> Any:
    """Load a transformer of the pipeline's class from another folder, or with the pipeline's config from one file."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    folder = Path(source.name) if Path(source.name).is_dir() else cached_snapshot(source.name)
    index: Any = DiffusionPipeline.load_config(str(folder))
    library, name = index["transformer"]
    kind: Any = getattr(import_module(library), name)
    options = {"dtype": dtype, "quantization_config": quantised, "local_files_only": True}
    if where.is_file() and not hasattr(kind, "from_single_file"):
        raise RecipeError(f"--transformer {where}: diffusers reads no single file of a {name}. Pass a folder.")
    try:
        if where.is_file():
            transformer = kind.from_single_file(str(where), config=str(folder), subfolder="transformer", **options)
        else:
            transformer = kind.from_pretrained(where, variant=chosen_variant(where, source.variant), **options)
    except Exception as error:  # converters of layouts raise whatever a missing tensor leads to
        raise RecipeError(
            f"--transformer {where} can't be read as the {name} of {source.name}: {type(error).__name__}: {error}"
        ) from error
    absent = [tensor for tensor, parameter in transformer.named_parameters() if parameter.is_meta]
    if absent:
        raise RecipeError(
            f"--transformer {where} has no {absent[0]} and {len(absent) - 1} further weights of the {name} that "
            f"{source.name} configures: it is of another model, or in a layout that diffusers does not know."
        )
    return transformer


def _component_dtypes(device: torch.device) -> Any:
    """Text encoders are frozen and large: bfloat16 on a GPU. The transformer and the VAE stay float32."""
    small = torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"text_encoder": small, "text_encoder_2": small, "text_encoder_3": small, "default": torch.float32}
