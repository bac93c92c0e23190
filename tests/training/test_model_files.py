"""Weights as users have them: variants, shards, another transformer in a folder or in one file of any known layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.world import sd3_parts
from tests.builders import toy_world
from tests.builders.original_layouts import stable_diffusion_3
from tests.builders.small_pipelines import _lively
from trajsurgery import RecipeError, tiny
from trajsurgery.cli import main as command
from trajsurgery.cli import noise_command
from trajsurgery.cli.train_command import main
from trajsurgery.evaluation.model_variants import base_source
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.rewards import packaged
from trajsurgery.rewards.weight_files import find_folder, is_local
from trajsurgery.tiny import sd3
from trajsurgery.tiny.pipe import WEIGHTS
from trajsurgery.training import components
from trajsurgery.training.checks import preflight
from trajsurgery.training.components import load_pipeline
from trajsurgery.training.model import model_folder
from trajsurgery.training.noise.noise_recipe import presets
from trajsurgery.training.settings import ModelSource

REWARD = "tests.builders.toy_world:LikesRed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world's pipeline: plain in `plain`, with the variant fp16, and its shards, in `half`."""
    path = tmp_path_factory.mktemp("models")
    with components.quiet():
        toy_world.pipeline().save_pretrained(path / "plain")
        toy_world.pipeline().to(torch.float16).save_pretrained(path / "half", variant="fp16", max_shard_size="20KB")
        other().save_pretrained(path / "sharded", max_shard_size="20KB")
    save_file(other().state_dict(), path / "other.safetensors")
    return path


def other() -> Any:
    """The toy world's transformer with other weights."""
    return _lively(toy_world.pipeline().transformer)


def assert_weights(loaded: Any, expected: Any) -> None:
    weights, others = loaded.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, others[name]), name


def load(name: Path, variant: str | None = None, transformer: Path | None = None) -> Any:
    with components.quiet():
        return load_pipeline(ModelSource(str(name), variant, transformer and str(transformer)))


def test_weights_of_a_variant_are_loaded_in_shards(folder: Path) -> None:
    assert len(list((folder / "half" / "transformer").glob("*.fp16-0000*-of-*.safetensors"))) > 1
    pipe, plain = load(folder / "half", "fp16"), toy_world.pipeline()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if (part := getattr(plain, name)) is not None:
            assert_weights(getattr(pipe, name), part.half().float())


def test_parts_without_the_variant_have_plain_names(folder: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(folder / "plain", tmp_path / "mixed")
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(folder / "half" / "transformer", mixed / "transformer")
    pipe = load(mixed, "fp16")
    assert_weights(pipe.transformer, toy_world.pipeline().transformer.half().float())
    assert_weights(pipe.vae, toy_world.pipeline().vae)


def test_a_variant_that_is_not_asked_for_is_named(folder: Path, tmp_path: Path) -> None:
    problem = model_folder.model_problem(ModelSource(str(folder / "half")))
    assert "no weights (*.safetensors), but some of the variant fp16: pass --model-variant fp16" in str(problem)
    problem = model_folder.model_problem(ModelSource(str(folder / "half"), "bf16"))
    assert "no weight file of the variant bf16, such as model.bf16.safetensors" in str(problem)
    broken = shutil.copytree(folder / "half", tmp_path / "half")
    shard = sorted((broken / "transformer").glob("*-of-*.safetensors"))[0]
    shard.unlink()
    problem = model_folder.model_problem(ModelSource(str(broken), "fp16"))
    assert f"transformer/ (FluxTransformer2DModel): no {shard.name}" in str(problem)


def test_another_transformer_comes_from_a_folder_of_shards(folder: Path, tmp_path: Path) -> None:
    assert_weights(load(folder / "plain", transformer=folder / "sharded").transformer, other())
    assert_weights(
        load(folder / "half", "fp16", folder / "half" / "transformer").transformer,
        toy_world.pipeline().transformer.half().float(),
    )
    broken = shutil.copytree(folder / "sharded", tmp_path / "sharded")
    shard = sorted(broken.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RecipeError, match=f"--transformer {broken}: no {shard.name}"):
        load(folder / "plain", transformer=broken)


def test_another_transformer_comes_from_one_file(folder: Path, tmp_path: Path) -> None:
    """The pipeline's folder then needs no weights of its own transformer, only the configuration."""
    bare = shutil.copytree(folder / "plain", tmp_path / "bare")
    (bare / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipe = load(bare, transformer=folder / "other.safetensors")
    assert_weights(pipe.transformer, other())
    assert_weights(pipe.vae, toy_world.pipeline().vae)
    count = sum(p.numel() for p in other().parameters())
    for place in ("other.safetensors", "sharded"):
        assert preflight.parameter_count(ModelSource(str(bare), transformer=str(folder / place))) == count
    assert preflight.parameter_count(ModelSource(str(folder / "half"), "fp16")) == count


def test_a_file_in_its_authors_layout_is_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain: Any = sd3_parts.transformer()
    config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    transformers = [_lively(SD3Transformer2DModel(**config | {"dual_attention_layers": (0, 1)})) for _ in range(2)]
    sd3.assemble_pipeline(WEIGHTS, tiny.pipeline().vae, transformers[0]).save_pretrained(tmp_path / "model")
    state = transformers[1].state_dict()
    original = stable_diffusion_3(state, len(plain.transformer_blocks))
    assert not original.keys() & state.keys()
    save_file(original, tmp_path / "sd3.5_medium.safetensors")
    assert_weights(
        load(tmp_path / "model", transformer=tmp_path / "sd3.5_medium.safetensors").transformer, transformers[1]
    )
    original.pop("model.diffusion_model.joint_blocks.1.x_block.mlp.fc2.bias")
    save_file(original, tmp_path / "less.safetensors")
    with pytest.raises(RecipeError, match=r"less\.safetensors can't be read as the SD3Transformer2DModel.*fc2\.bias"):
        load(tmp_path / "model", transformer=tmp_path / "less.safetensors")


def write(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        state = dict(other().state_dict())
        change(state)
        save_file(state, folder / "file.safetensors")
        return folder / "file.safetensors"

    return written


def incomplete(folder: Path) -> Path:
    other().save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if name != "proj_out.weight"}, file, {"format": "pt"})
    return folder


def garbage(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"not weights at all" * 9)
    return folder / name


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a weight is missing": (write(lambda state: state.pop("proj_out.weight")), "can't be read as the FluxTransformer"),
    "another width": (write(lambda s: s.update({"proj_out.bias": torch.zeros(3)})), "can't be read as the FluxT"),
    "scales": (write(lambda s: s.update({"proj_out.scale_weight": torch.ones(1)})), "is quantised: take the file in b"),
    "gguf": (lambda f: garbage(f, "flux1-dev-Q4_0.gguf"), "is quantised: take the file in b"),
    "garbage": (lambda f: garbage(f, "file.safetensors"), "can't be read as the FluxTransformer2DModel"),
    "a folder without a weight": (incomplete, "has no proj_out.weight and 0 further weights"),
    "no such file": (lambda f: f / "gone.safetensors", "there is no --transformer"),
    "an empty folder": (lambda f: f, "no config.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_such_transformer_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    make, message = WRONG[name]
    with pytest.raises(RecipeError) as raised:
        load(folder / "plain", transformer=make(tmp_path))
    assert message in str(raised.value)
    assert "--transformer" in str(raised.value)
    assert "hf download" not in str(raised.value)


def test_an_embedded_model_takes_neither(tmp_path: Path) -> None:
    for options in ({"model_variant": "fp16"}, {"transformer": "x.safetensors"}):
        with pytest.raises(RecipeError, match="tiny is embedded: --model-variant and --transformer need a folder"):
            preflight.check_recipe(replace(toy_world.recipe(tmp_path), **options))


def test_a_file_as_the_model_is_told_where_it_goes(folder: Path) -> None:
    file = folder / "other.safetensors"
    problem = model_folder.model_problem(ModelSource(str(file)))
    assert f"{file} is a file, and --model is a whole pipeline: pass --transformer {file}" in str(problem)


@pytest.mark.parametrize(
    "place",
    ["{}/nowhere", "./nowhere", "../nowhere", "~/nowhere", "models/flux/dev", "nowhere/", "flux1-dev.safetensors"],
)
def test_a_misspelt_path_is_never_answered_with_a_download(place: str, tmp_path: Path) -> None:
    place = place.format(tmp_path)
    answers = [
        model_folder.model_problem(ModelSource(place)),
        model_folder.advice(place),
        packaged.missing_weights(f"pickscore:{place}"),
        packaged.missing_weights(f"hpsv2.1:{place}"),
    ]
    with pytest.raises(RecipeError) as raised:
        load_pipeline(place)
    answers.append(str(raised.value))
    with pytest.raises(Exception, match="there is no folder") as refused:
        find_folder("CLIP", place)
    answers.append(str(refused.value))
    for answer in answers:
        assert answer
        assert "hf download" not in answer


def test_a_misspelt_folder_beside_others_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_local("models/fluxx")
    assert not is_local("black-forest-labs/FLUX.1-dev")
    assert "there is no folder models/fluxx" in str(model_folder.model_problem(ModelSource("models/fluxx")))


def test_a_damaged_folder_is_not_answered_with_a_download(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder / "plain", tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(RecipeError, match=r"broken can't be loaded.*save_pretrained") as raised:
        load(broken)
    assert "hf download" not in str(raised.value)


def files(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "half"),
        "model_variant": "fp16",
        "transformer": str(folder / "other.safetensors"),
    }


def test_a_run_and_its_evaluation_take_the_same_files(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    short = toy_world.recipe(tmp_path / "run", iterations=1)
    recipe = replace(
        short,
        **files(folder),
        reward=REWARD,
        prompts=str(prompts),
        heldout=str(prompts),
        rollout=replace(short.rollout, size=16, steps=3, batch=2),
        evaluation=replace(short.evaluation, images=2, steps=2, metrics=()),
    )
    assert main(recipe) is not None
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["model_variant"] == "fp16"
    words = ["evaluate", "--prompts", str(prompts), "--reward", REWARD, "--tuned", str(tmp_path / "run")]
    words += ["--images", "1", "--output", str(tmp_path / "evaluation")]
    assert command(words) == 0
    settings = json.loads((tmp_path / "evaluation" / "settings.json").read_text())
    assert {name: settings[name] for name in files(folder)} == files(folder)
    assert command([*words, "--transformer", str(folder / "sharded")]) == 1
    options = Evaluate("x", (REWARD,), tuned=(str(tmp_path / "run"),))
    assert base_source(options) == recipe.source
    assert base_source(replace(options, transformer="y")) == replace(recipe.source, transformer="y")
    assert base_source(replace(options, model=str(folder / "plain"))) == ModelSource(str(folder / "plain"))


def test_other_weights_in_the_transformer_s_file_are_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copy(folder / "other.safetensors", tmp_path / "file.safetensors")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = ["evaluate", "--prompts", str(tmp_path / "prompts.txt"), "--reward", REWARD, "--model"]
    words += [str(folder / "plain"), "--transformer", str(file), "--images", "1", "--steps", "1", "--height", "16"]
    words += ["--width", "16", "--output", str(tmp_path / "evaluation")]
    assert command(words) == 0
    assert command(words) == 0
    save_file(toy_world.pipeline().transformer.state_dict(), file)
    assert command(words) == 1
    assert "--transformer: other weights than these" in capsys.readouterr().out


def test_a_noise_search_takes_them_too(folder: Path) -> None:
    recipe = replace(presets("")["tiny"], prompt="a red circle", reward=REWARD, device="cpu", **files(folder))
    noise_command.check_noise_recipe(recipe)
    pipe, _ = noise_command._load_components(recipe)
    assert_weights(pipe.transformer, other())
    with pytest.raises(RecipeError, match="pass --model-variant fp16"):
        noise_command.check_noise_recipe(replace(recipe, model_variant=None, transformer=None))
