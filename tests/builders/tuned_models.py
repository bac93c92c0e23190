"""A model, a run that tuned it, adapters for it and prompts, as `trajsurgery evaluate` takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.builders import toy_world
from trajsurgery.training import components
from trajsurgery.training.model import lora
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Trained

ROWS = [
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
    {"tag": "counting", "include": [{"class": "square", "count": 2}], "prompt": "two squares"},
    {"tag": "colors", "include": [{"class": "square", "count": 1, "color": "blue"}], "prompt": "a blue square"},
]
REWARD = "tests.builders.toy_world:LikesRed"


def change_weights(pipe: Any, seed: int) -> Any:
    """Add noise to the weights of the pipeline's transformer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return pipe


def save_models(folder: Path) -> None:
    """Write model/, run/, adapters/ and prompts.jsonl."""
    with components.quiet():
        toy_world.pipeline().save_pretrained(folder / "model")
        change_weights(toy_world.pipeline(), 1).transformer.save_pretrained(folder / "run" / "transformer")
        adapted, trained = toy_world.pipeline(), Trained(what="lora", rank=2)
        lora.set_trainable(adapted.transformer, trained)
        lora.save_trained(change_weights(adapted, 2), trained, folder / "adapters")
    recipe = Recipe(model=str(folder / "model")).to_dict()
    recipe["rollout"] |= {"size": 16, "guidance": 2.0}
    recipe["evaluation"] |= {"steps": 3}
    (folder / "run" / "recipe.json").write_text(json.dumps(recipe))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def command_line(models: Path, output: Path, *more: str) -> list[str]:
    return [
        *("evaluate", "--prompts", str(models / "prompts.jsonl"), "--reward", REWARD, "--images", "3", "--batch", "2"),
        *("--tuned", str(models / "run"), "--output", str(output), *more),
    ]
