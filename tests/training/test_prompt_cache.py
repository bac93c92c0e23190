"""Prompts are encoded once for any pipeline, and its text encoders are freed."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.world import sd3_parts
from tests.builders import toy_world
from tests.pipelines.test_encoders import with_text
from trajsurgery import RecipeError, tiny
from trajsurgery.cli import train_command
from trajsurgery.runs import results, trainer
from trajsurgery.tiny import sd3
from trajsurgery.tiny.pipe import WEIGHTS
from trajsurgery.training.encodings.prompt_cache import PromptCache, free_text_encoders

TEXTS = ("a circle", "a red circle left of a blue square")
CALL = {"height": 16, "width": 16, "guidance_scale": 3.5}


def flux() -> tuple[Any, dict[str, Any]]:
    return toy_world.pipeline(), CALL


def sd3_with_three_encoders() -> tuple[Any, dict[str, Any]]:
    return sd3.assemble_pipeline(WEIGHTS, tiny.pipeline().vae, sd3_parts.transformer()), CALL


def sana() -> tuple[Any, dict[str, Any]]:
    text = with_text()
    arguments = {n: v for n, v in text.arguments.items() if n not in ("prompt", "num_inference_steps", "output_type")}
    return text.pipe, arguments


@pytest.mark.parametrize("build", [flux, sd3_with_three_encoders, sana])
def test_cached_prompts_give_the_encoders_images_and_the_encoders_are_freed(build: Any) -> None:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    dtype = pipe.transformer.dtype

    def images(**arguments: Any) -> torch.Tensor:
        arguments = {**call, **arguments, "num_inference_steps": 2, "output_type": "pt"}
        return pipe(**arguments, generator=torch.Generator().manual_seed(3))[0]

    text_arguments = PromptCache(build()[0], ())(TEXTS)
    plain = images(**text_arguments)
    embeddings = PromptCache(pipe, ["a", *TEXTS], call, batch=2)
    encoder_weights = [
        weakref.ref(p) for n in pipe.components if "text_encoder" in n for p in getattr(pipe, n).parameters()
    ]
    names = free_text_encoders(pipe)
    gc.collect()
    assert names
    assert all(getattr(pipe, name) is None for name in names)
    assert encoder_weights
    assert all(ref() is None for ref in encoder_weights)
    torch.testing.assert_close(images(**embeddings(TEXTS)), plain, atol=1e-4, rtol=1e-4)
    assert pipe.transformer.dtype == dtype
    with pytest.raises(RecipeError, match="have been let go"):
        images(**embeddings(["a dog"]))


def test_encoders_move_to_the_named_device() -> None:
    pipe = toy_world.pipeline()
    pipe.set_progress_bar_config(disable=True)
    encoder = pipe.text_encoder_2
    PromptCache(pipe, TEXTS, CALL)
    free_text_encoders(pipe, "meta")
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert pipe.transformer.device.type == "cpu"


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_frees_its_encoders_before_the_first_image(keep: bool, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=1)
    recipe = replace(recipe, train=replace(recipe.train, keep_encoders=keep))
    world, encoders_freed = toy_world.world(recipe), list[bool]()
    evaluate = trainer.evaluate

    def recording(*args: Any) -> Any:
        encoders_freed.append(world.pipe.text_encoder is None)
        return evaluate(*args)

    for module in (trainer, results):
        monkeypatch.setattr(module, "evaluate", recording)
    assert train_command.main(recipe, world) is not None
    assert encoders_freed == [not keep] * 2
