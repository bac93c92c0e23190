"""What the transformer's weights are kept in: float32, bfloat16, or quantised under adapters."""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trajsurgery.errors import RecipeError
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Trained

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
"""Which package quantises to what."""


KEPT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes a weight; nf4 has a float32 scale for each 64 of them."""


def kept_in(recipe: Recipe) -> str:
    """Return what the transformer's weights are kept in, the frozen ones where adapters train: a key of `KEPT`."""
    trained = recipe.train
    name = trained.weights if trained.what == "full" else trained.base
    return recipe.rollout.precision if name == "auto" else name


def kept_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of the transformer's weights, of the frozen ones where adapters train."""
    return torch.float32 if kept_in(recipe) == "float32" else torch.bfloat16


def to_bfloat16(module: nn.Module) -> None:
    """Convert a transformer's weights, but for the modules that diffusers keeps in float32, as it does in loading."""
    exempt: set[str] = set(getattr(module, "_keep_in_fp32_modules", None) or [])
    for name, parameter in module.named_parameters():
        if exempt.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)


def is_quantised(trained: Trained) -> bool:
    """Whether the frozen weights beside adapters are quantised."""
    return trained.what == "lora" and trained.base in PACKAGES


def quantisation(trained: Trained) -> Any:
    """Return diffusers' config that quantises the transformer as it is loaded; None if it stays as it is.

    Raises:
        RecipeError: the package that quantises is missing.
    """
    if not is_quantised(trained):
        return None
    package = PACKAGES[trained.base]
    if find_spec(package) is None:
        raise RecipeError(f"--train.base {trained.base} needs {package}: pip install 'trajsurgery[gpu]'.")
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig, TorchAoConfig

    with warnings.catch_warnings():  # of kernels that the packages have for other versions of torch
        warnings.simplefilter("ignore")
        if trained.base == "int8":
            config: Any = TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig(version=2))
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def run_in_bfloat16(module: nn.Module) -> None:
    """Run a module under bfloat16 autocast over float32 weights, with float32 outputs."""
    forward, kind = module.forward, next(module.parameters()).device.type

    @functools.wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, torch.bfloat16):
            output = forward(*args, **kwargs)
        return tree_map(lambda v: v.float() if isinstance(v, Tensor) else v, output)

    module.forward = cast
