"""What trains: all weights, those matching a pattern, or LoRA adapters (Hu et al., 2021) through peft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.settings import Trained


def set_trainable(module: Any, trained: Trained, seed: int = 0) -> None:
    """Set `requires_grad` for what the recipe trains: all weights, those matching a pattern, or new adapters.

    Adapters are float32. Their A matrices are drawn from `seed`, their B matrices are zero, so that the model's output
    does not change.

    Raises:
        RecipeError: no parameter matches the pattern, no layer matches the targets, or the class takes no adapters.
    """
    module.requires_grad_(False)
    if trained.what == "lora":
        _add_adapters(module, trained, seed)
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


def _add_adapters(module: Any, trained: Trained, seed: int) -> None:
    from peft import LoraConfig

    if list(getattr(module, "peft_config", ())) == [
        "default"
    ]:  # of an earlier run with this module, which has saved them
        module.unload_lora()
    layers = target_layers(module, trained.targets)
    if not layers:
        linear = sorted({n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)})
        raise RecipeError(
            f"train.targets = {trained.targets}: no linear layer's name ends so. There are {', '.join(linear)}."
        )
    if not hasattr(module, "add_adapter"):
        raise RecipeError(f"{type(module).__name__} takes no adapters (diffusers' PeftAdapterMixin): train.what full.")
    with torch.random.fork_rng(devices=[]):  # peft draws from torch's global generator
        torch.manual_seed(seed)
        module.add_adapter(LoraConfig(r=trained.rank, lora_alpha=trained.rank, target_modules=list(trained.targets)))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_layers(module: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the linear layers that peft would adapt: their name is a target, or ends in a dot and a target."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    }


class CountedLoRA(nn.Module):
    """A linear layer with an adapter, computed as peft does. For the dry run: peft's own can't use fake tensors."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output plus the adapter's."""
        output = self.base(x)
        return (output + self.b(self.a(x.to(self.a.weight.dtype))) * 1.0).to(output.dtype)


def set_trainable_fake(module: nn.Module, trained: Trained) -> None:
    """As `set_trainable`, for a module of fake tensors."""
    if trained.what == "full":
        set_trainable(module, trained)
        return
    module.requires_grad_(False)
    for name, layer in target_layers(module, trained.targets).items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, CountedLoRA(layer, trained.rank))


def save_trained(pipe: Any, trained: Trained, folder: Path) -> None:
    """Save what trained: the transformer, or adapters that `load_lora_weights(folder)` of diffusers reads.

    All ranks call this together; the first one writes.
    """
    if trained.what == "full":
        module = pipe.transformer
        if sharding.is_sharded(module):
            module = sharding.unsharded_copy(module)
        if ranks.is_main():
            module.save_pretrained(folder)
        return
    if not ranks.is_main():
        return
    from peft.utils import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(pipe.transformer)
    config = pipe.transformer.peft_config["default"].to_dict()
    whole = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}
    type(pipe).save_lora_weights(
        folder, transformer_lora_layers=whole, transformer_lora_adapter_metadata=config, safe_serialization=True
    )
