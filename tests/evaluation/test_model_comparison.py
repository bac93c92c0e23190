"""`trajsurgery evaluate`: images of plain pipeline calls in GenEval's folders, generated once; models compared."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from tests.builders import toy_world
from tests.builders.tuned_models import REWARD, ROWS, command_line, save_models
from trajsurgery.cli import main
from trajsurgery.evaluation import model_comparison, model_variants
from trajsurgery.evaluation.comparison_table import Comparison, to_markdown
from trajsurgery.evaluation.geneval_folders import Sample
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.evaluation.paired_statistics import paired
from trajsurgery.training import components
from trajsurgery.training.model import compilation
from trajsurgery.training.prompts import Prompt

CALL = {"num_inference_steps": 3, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run that tuned it, adapters for it, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of a base, a tuned transformer and adapters; all other settings come from the run."""
    output = tmp_path_factory.mktemp("evaluation")
    assert main(command_line(models, output, "--tuned", str(models / "adapters"))) == 0
    return output


def pixels(file: Path) -> np.ndarray:
    """UInt8[h w 3]."""
    with Image.open(file) as picture:
        return np.array(picture)


def plain_call(pipe: Any, number: int, call: dict[str, Any]) -> list[np.ndarray]:
    """The batch of images 2 * number and 2 * number + 1, by a plain call of the pipeline."""
    samples = [(i, n) for i in range(3) for n in range(3)][2 * number : 2 * number + 2]
    generators = [torch.Generator().manual_seed(i * 2**16 + n) for i, n in samples]
    prompts = [ROWS[i]["prompt"] for i, _ in samples]
    return [np.asarray(image) for image in pipe(prompts, generator=generators, **call).images]


@pytest.mark.parametrize("name", ["base", "run", "adapters"])
def test_images_are_those_of_a_plain_call(models: Path, evaluated: Path, name: str) -> None:
    with components.quiet():
        pipe = toy_world.pipeline().from_pretrained(models / "model")
        if name == "run":
            pipe.transformer = type(pipe.transformer).from_pretrained(models / "run" / "transformer")
        if name == "adapters":
            pipe.load_lora_weights(str(models / "adapters"), weight_name=model_variants.LORA)
    pipe.set_progress_bar_config(disable=True)
    for number in (1, 4):  # the last batch holds one image
        images = plain_call(pipe, number, {**CALL, "guidance_scale": 2.0})
        for place, image in enumerate(images, 2 * number):
            file = evaluated / name / f"{place // 3:05d}" / "samples" / f"{place % 3:04d}.png"
            assert np.array_equal(pixels(file), image), file


def test_the_folders_are_what_geneval_reads(evaluated: Path) -> None:
    """Read as by its evaluate_images.py: folders of digits, one JSON object, samples of digits and .png."""
    for name in ("base", "run", "adapters"):
        folders = sorted(f for f in (evaluated / name).iterdir() if f.is_dir() and f.name.isdigit())
        assert [f.name for f in folders] == ["00000", "00001", "00002"]
        for folder, row in zip(folders, ROWS):
            assert json.loads((folder / "metadata.jsonl").read_text()) == row
            pictures = sorted(f.name for f in (folder / "samples").iterdir() if re.match(r"\d+\.png", f.name))
            assert pictures == ["0000.png", "0001.png", "0002.png"]
            assert len(list((folder / "samples").iterdir())) == 3
    assert pixels(evaluated / "base" / "00000" / "samples" / "0000.png").shape == (16, 16, 3)


def test_scores_and_gains_are_those_of_the_files(evaluated: Path) -> None:
    result = json.loads((evaluated / "evaluation.json").read_text())
    reward, texts = toy_world.LikesRed(), [row["prompt"] for row in ROWS for _ in range(3)]
    scores: dict[str, torch.Tensor] = {}
    for name in ("base", "run"):
        files = [evaluated / name / f"{i:05d}" / "samples" / f"{n:04d}.png" for i in range(3) for n in range(3)]
        images = torch.stack([torch.from_numpy(pixels(f)) for f in files]).permute(0, 3, 1, 2)
        scores[name] = reward(images / 255, texts)
        assert [row["scores"][name][REWARD] for row in result["images"]] == pytest.approx(
            scores[name].tolist(), abs=1e-6
        )
    gain = paired(scores["base"], scores["run"], tuple(texts))
    line = result["gains"]["all"]["run"][REWARD]
    assert line == pytest.approx({name: getattr(gain, name) for name in line}, abs=1e-6)
    assert gain.gain != 0
    assert result["means"]["all"]["base"][REWARD]["mean"] == pytest.approx(float(scores["base"].mean()), abs=1e-6)
    colours = torch.tensor([*range(3), *range(6, 9)])
    part = paired(scores["base"][colours], scores["run"][colours], tuple(texts[i] for i in colours))
    assert result["gains"]["colors"]["run"][REWARD]["gain"] == pytest.approx(part.gain, abs=1e-6)
    assert result["gains"]["counting"]["run"][REWARD]["se_by_prompt"] is None, "one prompt has no spread"
    assert [row["seed"] for row in result["images"]] == [i * 2**16 + n for i in range(3) for n in range(3)]
    assert result["call"] == {**CALL, "guidance_scale": 2.0}
    with (evaluated / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(r[REWARD]) for r in lines if r["model"] == "run"] == pytest.approx(scores["run"].tolist(), abs=1e-6)
    text = (evaluated / "table.md").read_text()
    assert f"{gain.gain:+.4f} ± {gain.se_by_prompt:.4f}" in text
    assert f"| colors: {REWARD} |" in text


def test_existing_images_are_kept_and_missing_ones_are_generated_the_same(
    models: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a kill: some images exist, one in a batch whose other image is missing, and one file is incomplete."""
    output = tmp_path / "again"
    assert _files(shutil.copytree(evaluated, output)) == _files(evaluated)
    for file in ("base/00000/samples/0001.png", "run/00002/samples/0002.png", "evaluation.json", "table.md"):
        (output / file).unlink()
    (output / "base/00000/samples/0001.png.123.partial").write_bytes(b"\x89PNG")
    loaded, before = list[str](), {file: (output / file).stat().st_mtime_ns for file in _files(output)}
    load = model_variants.ModelVariant.load
    monkeypatch.setattr(
        model_variants.ModelVariant, "load", lambda v, *arguments: loaded.append(v.name) or load(v, *arguments)
    )
    assert main(command_line(models, output, "--tuned", str(models / "adapters"))) == 0
    assert loaded == ["base", "run"], "a model that has all its images is not loaded"
    files = _files(output)
    complete = {name: data for name, data in files.items() if "partial" not in name and name != "evaluation.json"}
    assert complete == {name: data for name, data in _files(evaluated).items() if name != "evaluation.json"}
    expected, actual = (json.loads((folder / "evaluation.json").read_text()) for folder in (evaluated, output))
    assert expected | {"options": None} == actual | {"options": None}
    assert all((output / f).stat().st_mtime_ns == time for f, time in before.items() if f.endswith("0000.png"))
    printed = capsys.readouterr().out
    assert "images of base 9/9" in printed
    assert "images of adapters" not in printed


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_interruption_says_how_to_resume(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_comparison, "make_images", interrupted)
    assert main(command_line(models, tmp_path / "x")) == 130
    assert "the same command goes on" in capsys.readouterr().out


def test_another_evaluation_in_the_folder_is_refused_with_the_differences(
    models: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(evaluated, tmp_path / "other")
    monkeypatch.setattr(model_comparison, "_make_images", lambda *_: pytest.fail("images were made"))
    assert main(command_line(models, output, "--steps", "4", "--seed", "1")) == 1
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("seed: 0 there, 1 here", "'num_inference_steps': 3", "--overwrite"):
        assert part in printed
    (output / "settings.json").unlink()
    assert main(command_line(models, output)) == 1
    assert "holds images of another evaluation" in capsys.readouterr().out
    assert (output / "base" / "00000" / "samples" / "0000.png").is_file()


def test_the_fingerprint_changes_with_the_weights(models: Path, tmp_path: Path) -> None:
    file = shutil.copytree(models / "run", tmp_path / "run") / "transformer" / "diffusion_pytorch_model.safetensors"
    variant = model_variants.find_variants(Evaluate("x", (REWARD,), tuned=(str(tmp_path / "run"),)))[1]
    before = variant.fingerprint()
    assert variant.fingerprint() == before
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert variant.fingerprint() != before


def test_the_kind_and_name_of_a_tuned_model(models: Path) -> None:
    kinds = {"run": "transformer", "run/transformer": "transformer", "adapters": "adapters", "model": "model"}
    for where, kind in kinds.items():
        variant = model_variants.find_variants(Evaluate("x", (REWARD,), model="tiny", tuned=(str(models / where),)))[1]
        assert (variant.kind, variant.name) == (kind, where.split("/")[0])
    variants = model_variants.find_variants(
        Evaluate("x", (REWARD,), tuned=(str(models / "adapters" / model_variants.LORA),))
    )
    assert [(v.kind, v.where) for v in variants[:1]] == [("model", "tiny")]
    assert variants[1].kind == "adapters"


WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "prompts": (lambda f: ["--prompts", str(f / "gone.txt")], "there is no file"),
    "reward": (lambda f: ["--reward", "hpsv2.1"], "hf download xswu/HPSv2"),
    "no such reward": (lambda f: ["--reward", "nothing"], "no reward 'nothing'"),
    "part of a mixture": (lambda f: ["--reward", "0.5*tiny+0.5*pickscore"], "hf download yuvalkirstain"),
    "a size that a reward does not take": (lambda f: ["--reward", "tiny"], r"takes images \[batch, 3, 32, 32\]"),
    "model": (lambda f: ["--model", str(f / "run")], r"a folder without model_index\.json"),
    "video": (lambda f: ["--model", "tiny:wan"], "makes videos"),
    "tuned": (lambda f: ["--tuned", str(f)], "holds nothing tuned"),
    "nobody": (lambda f: ["--tuned", "nobody/nothing"], "neither a local folder nor in the Hugging Face cache"),
    "twice": (lambda f: ["--tuned", str(f / "run" / "transformer")], "two models are called run"),
    "images": (lambda f: ["--images", "0"], "images = 0: it is at least 1"),
    "seed": (lambda f: ["--seed", "-1"], "seed = -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_options_are_refused_before_an_image_is_generated(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, message = WRONG[name]
    monkeypatch.setattr(components, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    arguments = command_line(models, tmp_path / "out")
    for flag, value in zip(*[iter(change(models))] * 2):
        if flag in arguments and flag not in ("--tuned", "--reward"):
            place = arguments.index(flag)
            del arguments[place : place + 2]
        arguments += [flag, value]
    assert main(arguments) == 1
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "out").exists()


def test_repeated_prompts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cat\na cat\na dog\n")
    words = ["--prompts", str(tmp_path / "p.txt"), "--model", "tiny", "--reward", "nothing", "--output", str(tmp_path)]
    assert main(["evaluate", *words]) == 1
    assert "p.txt: 1 of 3 prompts repeat others" in capsys.readouterr().out


def test_a_pipeline_without_images_is_an_error() -> None:
    from trajsurgery.evaluation.geneval_folders import make_images

    class Films:
        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"frames": [1]})()

    with pytest.raises(Exception, match="Films gave Output for 1 prompts"):
        make_images(Films(), {}, Path("nowhere"), [Sample(0, Prompt("x"), 0, 0)], 1)


def test_prompts_without_a_category_are_not_taken_for_all() -> None:
    prompts = (Prompt("p0"), Prompt("p1", "colors"), Prompt("p2", "colors"))
    samples = [Sample(i, prompt, 0, i) for i, prompt in enumerate(prompts)]
    comparison = Comparison(("base",), ("r",), samples, {"base": {"r": [0.0, 3.0, 6.0]}})
    means = {part: figures["base"]["r"]["mean"] for part, figures in comparison.to_dict()["means"].items()}
    assert means == {"all": 3.0, "no category": 0.0, "colors": 4.5}
    assert "| no category: r | 0.0000 |" in to_markdown(comparison)


@pytest.mark.slow
def test_the_tiny_model_is_scored_by_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", "tiny", "--reward", "tiny", "--limit", "6", "--images", "1", "--steps", "8", "--batch", "6"]
    assert main(["evaluate", *options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(result["means"]["all"]["base"]) == {"tiny", "rules"}
    assert {row["scores"]["base"]["rules"] for row in result["images"]} <= {0.0, 1.0}
    assert result["means"]["all"]["base"]["tiny"]["mean"] > 0.2
    assert len(result["means"]) == 1 + 6
    assert not math.isnan(result["means"]["all"]["base"]["tiny"]["standard_error"])
    assert "position: rules" in capsys.readouterr().out


def test_images_are_generated_in_inference_mode_by_compiled_blocks(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled, inference = list[str](), set[bool]()

    def backend(graph: Any, _: Any) -> Any:
        compiled.append("a graph")
        return graph

    forward = FluxTransformer2DModel.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        inference.add(torch.is_inference_mode_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", recording)
    monkeypatch.setattr(compilation, "BACKEND", backend)
    line = [*command_line(models, tmp_path), "--limit", "1"]
    assert main([*line, "--compile"]) == 0
    assert compiled
    assert inference == {True}
    assert main(line) == 1
    assert "compile: True there, None here" in " ".join(capsys.readouterr().out.split())
