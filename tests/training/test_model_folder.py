"""Model folders: saving and loading Flux and SD3.5 with their tokenizers, runs from a folder, missing parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from benchmarks.world import sd3_parts
from tests.builders import toy_world
from tests.builders.small_pipelines import _lively
from trajsurgery import RecipeError, tiny
from trajsurgery.cli.train_command import main
from trajsurgery.tiny import sd3
from trajsurgery.tiny.pipe import WEIGHTS
from trajsurgery.training import components
from trajsurgery.training.checks import preflight
from trajsurgery.training.model import model_folder
from trajsurgery.training.settings import ModelSource

LONG = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 2, "output_type": "pt"}


def medium() -> torch.nn.Module:
    """The tiny SD3's transformer with SD3.5-Medium's second attention in its first blocks; queries and keys normed."""
    config = {name: value for name, value in sd3_parts.transformer().config.items() if not name.startswith("_")}
    return SD3Transformer2DModel(**config | {"dual_attention_layers": (0, 1)})


@pytest.fixture(scope="module", params=["flux", "sd3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline with tokenizers, and the folder that holds it."""
    torch.manual_seed(0)
    flux = tiny.pipeline()
    pipe = flux if request.param == "flux" else sd3.assemble_pipeline(WEIGHTS, flux.vae, _lively(medium()))
    path = tmp_path_factory.mktemp(request.param) / "model"
    pipe.save_pretrained(path)
    return pipe, path


def test_a_pipeline_loads_from_its_folder(saved: tuple[Any, Path]) -> None:
    pipe, path = saved
    assert model_folder.missing_parts(path) == []
    loaded = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    if isinstance(loaded.transformer, SD3Transformer2DModel):
        assert loaded.transformer.config["qk_norm"] == "rms_norm"
        assert [block.use_dual_attention for block in loaded.transformer.transformer_blocks] == [True, True, False]
    for name in (n for n in pipe.components if "tokenizer" in n):
        texts = ["a red circle", "two blue squares left of a triangle"]
        assert getattr(loaded, name)(texts)["input_ids"] == getattr(pipe, name)(texts)["input_ids"]
    images = [p("a red circle", **LONG, generator=torch.Generator().manual_seed(1))[0] for p in (pipe, loaded)]
    # freshly loaded weights are unaligned in memory: the last bit may differ
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)


def test_a_recipe_runs_from_a_folder(saved: tuple[Any, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    short = toy_world.recipe(tmp_path / "run", iterations=2)
    recipe = replace(
        short,
        model=str(saved[1]),
        reward="tests.builders.toy_world:LikesRed",
        prompts=str(prompts),
        heldout=str(prompts),
        rollout=replace(short.rollout, size=32, steps=3, batch=2),
        evaluation=replace(short.evaluation, images=2, steps=2, metrics=()),
    )
    result = main(recipe)
    assert result is not None
    assert (recipe.output / "transformer" / "config.json").is_file()


def remove_part(path: Path, part: str) -> None:
    """Remove a part of a pipeline, or one file of it."""
    shutil.rmtree(path / part) if (path / part).is_dir() else (path / part).unlink()


@pytest.mark.parametrize(
    "part, message",
    [
        ("tokenizer", r"tokenizer/ \(CLIPTokenizer\): no such folder"),
        ("tokenizer_2/tokenizer.json", r"tokenizer_2/ .*no vocabulary"),
        ("vae", r"vae/ \(AutoencoderKL\): no such folder"),
        ("transformer/diffusion_pytorch_model.safetensors", r"transformer/ .*no weights"),
        ("text_encoder/config.json", r"text_encoder/ .*no config\.json"),
        ("scheduler/scheduler_config.json", r"scheduler/ .*no scheduler_config\.json"),
        ("model_index.json", r"without model_index\.json"),
    ],
)
def test_a_missing_part_is_reported_before_loading(part: str, message: str, tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "model")
    remove_part(tmp_path / "model", part)
    name = str(tmp_path / "model")
    for check in (
        lambda: preflight.check_recipe(replace(toy_world.recipe(tmp_path), model=name)),
        lambda: components.load_pipeline(name),
    ):
        with pytest.raises(RecipeError, match=message):
            check()


def test_a_missing_folder_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    for model in (str(tmp_path / "nowhere"), "./nowhere"):
        problem = model_folder.model_problem(ModelSource(model))
        assert problem is not None
        assert f"there is no folder {model}" in problem
        assert "hf download" not in problem


def test_an_uncached_hub_id_is_refused_with_the_download_command(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing is fetched here.*hf download nobody/nothing"):
        components.load_pipeline("nobody/nothing")
