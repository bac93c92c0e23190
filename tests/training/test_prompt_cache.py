"""Prompts are encoded once for any pipeline, and its text encoders are let go."""

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
from trajsurgery.tiny import sd3
from trajsurgery.tiny.pipe import WEIGHTS
from trajsurgery.training.prompt_cache import PromptCache, free_text_encoders

TEXTS = ("a circle", "a red circle left of a blue square")
CALL = {"height": 16, "width": 16, "guidance_scale": 3.5}


def flux() -> tuple[Any, dict[str, Any]]:
    return toy_world.pipeline(), CALL


def three() -> tuple[Any, dict[str, Any]]:
    return sd3.assemble_pipeline(WEIGHTS, tiny.pipeline().vae, sd3_parts.transformer()), CALL


def sana() -> tuple[Any, dict[str, Any]]:
    text = with_text()
    rest = {n: v for n, v in text.arguments.items() if n not in ("prompt", "num_inference_steps", "output_type")}
    return text.pipe, rest


@pytest.mark.parametrize("build", [flux, three, sana])
def test_images_are_those_of_the_encoders_and_no_encoder_is_left(build: Any) -> None:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe.transformer.dtype

    def images(**given: Any) -> torch.Tensor:
        given = {**call, **given, "num_inference_steps": 2, "output_type": "pt"}
        return pipe(**given, generator=torch.Generator().manual_seed(3))[0]

    length = PromptCache(build()[0], ())(TEXTS)
    plain = images(**length)
    embeddings = PromptCache(pipe, ["a", *TEXTS], call, batch=2)
    held = [weakref.ref(p) for n in pipe.components if "text_encoder" in n for p in getattr(pipe, n).parameters()]
    names = free_text_encoders(pipe)
    gc.collect()
    assert names
    assert all(getattr(pipe, name) is None for name in names)
    assert held
    assert all(ref() is None for ref in held)
    torch.testing.assert_close(images(**embeddings(TEXTS)), plain, atol=1e-4, rtol=1e-4)
    assert pipe.transformer.dtype == wanted
    with pytest.raises(RecipeError, match="have been let go"):
        images(**embeddings(["a dog"]))


def test_encoders_go_to_the_place_that_is_named() -> None:
    pipe = toy_world.pipeline()
    pipe.set_progress_bar_config(disable=True)
    held = pipe.text_encoder_2
    PromptCache(pipe, TEXTS, CALL)
    free_text_encoders(pipe, "meta")
    assert {p.device.type for p in held.parameters()} == {"meta"}
    assert pipe.transformer.device.type == "cpu"


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_lets_its_encoders_go_before_the_first_image(keep: bool, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = toy_world.recipe(tmp_path, iterations=1)
    recipe = replace(recipe, train=replace(recipe.train, keep_encoders=keep))
    scene, seen = toy_world.world(recipe), list[bool]()
    own = train_command.evaluate

    def watched(*args: Any) -> Any:
        seen.append(scene.pipe.text_encoder is None)
        return own(*args)

    monkeypatch.setattr(train_command, "evaluate", watched)
    assert train_command.main(recipe, scene) is not None
    assert seen == [not keep] * 2
