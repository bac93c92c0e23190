"""Low-rank adapters (Hu et al., 2021) through peft: put into a transformer, and saved for diffusers to read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError
from trajsurgery.training.settings import Trained


def choose(module: Any, trained: Trained) -> None:
    """Lets train what a recipe names, and nothing else: all weights, those a pattern names, or new adapters.

    Adapters are float32, as all masters are; B starts at zero, so that the model is what it was.

    Raises:
        RecipeError: no parameter of the module has such a name; its class takes no adapters.
    """
    module.requires_grad_(False)
    if trained.what == "lora":
        _adapt(module, trained)
        return
    names = [name for name, _ in module.named_parameters()]
    chosen = {n for n in names if trained.pattern is None or re.search(trained.pattern, n)}
    if not chosen:
        raise RecipeError(
            f"train.pattern = {trained.pattern!r} is found in no parameter's name. They are like "
            f"{', '.join(names[:: max(1, len(names) // 4)][:4])}."
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)


def _adapt(module: Any, trained: Trained) -> None:
    from peft import LoraConfig

    found = targeted(module, trained.targets)
    if not found:
        linear = sorted({n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)})
        raise RecipeError(
            f"train.targets = {trained.targets}: no linear layer's name ends so. There are {', '.join(linear)}."
        )
    if not hasattr(module, "add_adapter"):
        raise RecipeError(f"{type(module).__name__} takes no adapters (diffusers' PeftAdapterMixin): train.what full.")
    module.add_adapter(LoraConfig(r=trained.rank, lora_alpha=trained.rank, target_modules=list(trained.targets)))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def targeted(module: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers that peft would adapt: their name is a target, or ends in a dot and a target."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    }


class Adapted(nn.Module):
    """A linear layer and its adapter as peft computes them, for counting: peft's own can't be made of fake tensors."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        found = self.base(x)
        return found + self.b(self.a(x.to(self.a.weight.dtype))) * 1.0


def stand_in(module: nn.Module, trained: Trained) -> None:
    """`choose` for a module of fake tensors; adapters have the default dtype."""
    if trained.what == "full":
        choose(module, trained)
        return
    module.requires_grad_(False)
    for name, layer in targeted(module, trained.targets).items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, Adapted(layer, trained.rank))


def save(pipe: Any, trained: Trained, folder: Path) -> None:
    """Writes what trained: the whole transformer, or adapters that a plain pipe's `load_lora_weights(folder)` reads."""
    if trained.what == "full":
        pipe.transformer.save_pretrained(folder)
        return
    from peft.utils import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(pipe.transformer)
    config = pipe.transformer.peft_config["default"].to_dict()
    whole = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}
    type(pipe).save_lora_weights(
        folder, transformer_lora_layers=whole, transformer_lora_adapter_metadata=config, safe_serialization=True
    )
