"""`trajsurgery evaluate`: images of a plain call, never made twice, in GenEval's folders; models side by side."""

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
from PIL import Image

from tests.builders import toy_world
from trajsurgery.cli import main
from trajsurgery.evaluation import model_comparison, model_variants
from trajsurgery.evaluation.geneval_folders import Sample
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.evaluation.paired_statistics import paired
from trajsurgery.training import components, lora
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.settings import Trained

ROWS = [
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
    {"tag": "counting", "include": [{"class": "square", "count": 2}], "prompt": "two squares"},
    {"tag": "colors", "include": [{"class": "square", "count": 1, "color": "blue"}], "prompt": "a blue square"},
]
REWARD = "tests.builders.toy_world:LikesRed"
CALL = {"num_inference_steps": 3, "height": 16, "width": 16}


def moved(pipe: Any, seed: int) -> Any:
    """The pipe with other weights in its transformer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return pipe


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the run of another one tuned from it, adapters for it, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    with components.quiet():
        toy_world.pipeline().save_pretrained(folder / "model")
        moved(toy_world.pipeline(), 1).transformer.save_pretrained(folder / "run" / "transformer")
        adapted, trained = toy_world.pipeline(), Trained(what="lora", rank=2)
        lora.set_trainable(adapted.transformer, trained)
        lora.save_trained(moved(adapted, 2), trained, folder / "adapters")
    recipe = Recipe(model=str(folder / "model")).to_dict()
    recipe["rollout"] |= {"size": 16, "guidance": 2.0}
    recipe["evaluation"] |= {"steps": 3}
    (folder / "run" / "recipe.json").write_text(json.dumps(recipe))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def words(there: Path, output: Path, *more: str) -> list[str]:
    return [
        *("evaluate", "--prompts", str(there / "prompts.jsonl"), "--reward", REWARD, "--images", "3", "--batch", "2"),
        *("--tuned", str(there / "run"), "--output", str(output), *more),
    ]


@pytest.fixture(scope="module")
def done(there: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of a base, a tuned transformer and adapters: everything but them comes from the run."""
    output = tmp_path_factory.mktemp("evaluation")
    assert main(words(there, output, "--tuned", str(there / "adapters"))) == 0
    return output


def pixels(file: Path) -> np.ndarray:
    """UInt8[h w 3]."""
    with Image.open(file) as picture:
        return np.array(picture)


def plain(pipe: Any, number: int, call: dict[str, Any]) -> list[np.ndarray]:
    """The batch of images 2 * number and 2 * number + 1, by a call of the pipe that knows nothing of us."""
    asked = [(i, n) for i in range(3) for n in range(3)][2 * number : 2 * number + 2]
    generators = [torch.Generator().manual_seed(i * 2**16 + n) for i, n in asked]
    prompts = [ROWS[i]["prompt"] for i, _ in asked]
    return [np.asarray(image) for image in pipe(prompts, generator=generators, **call).images]


@pytest.mark.parametrize("name", ["base", "run", "adapters"])
def test_images_are_those_of_a_plain_call(there: Path, done: Path, name: str) -> None:
    with components.quiet():
        pipe = toy_world.pipeline().from_pretrained(there / "model")
        if name == "run":
            pipe.transformer = type(pipe.transformer).from_pretrained(there / "run" / "transformer")
        if name == "adapters":
            pipe.load_lora_weights(str(there / "adapters"), weight_name=model_variants.LORA)
    pipe.set_progress_bar_config(disable=True)
    for number in (1, 4):  # the last batch holds one image
        found = plain(pipe, number, {**CALL, "guidance_scale": 2.0})
        for place, image in enumerate(found, 2 * number):
            file = done / name / f"{place // 3:05d}" / "samples" / f"{place % 3:04d}.png"
            assert np.array_equal(pixels(file), image), file


def test_the_folders_are_what_geneval_reads(done: Path) -> None:
    """Read as its evaluate_images.py does: folders of digits, one JSON object, samples of digits and .png."""
    for name in ("base", "run", "adapters"):
        folders = sorted(f for f in (done / name).iterdir() if f.is_dir() and f.name.isdigit())
        assert [f.name for f in folders] == ["00000", "00001", "00002"]
        for folder, row in zip(folders, ROWS):
            assert json.loads((folder / "metadata.jsonl").read_text()) == row
            pictures = sorted(f.name for f in (folder / "samples").iterdir() if re.match(r"\d+\.png", f.name))
            assert pictures == ["0000.png", "0001.png", "0002.png"]
            assert len(list((folder / "samples").iterdir())) == 3
    assert pixels(done / "base" / "00000" / "samples" / "0000.png").shape == (16, 16, 3)


def test_scores_and_gains_are_those_of_the_files(done: Path) -> None:
    found = json.loads((done / "evaluation.json").read_text())
    reward, texts = toy_world.LikesRed(), [row["prompt"] for row in ROWS for _ in range(3)]
    scores: dict[str, torch.Tensor] = {}
    for name in ("base", "run"):
        files = [done / name / f"{i:05d}" / "samples" / f"{n:04d}.png" for i in range(3) for n in range(3)]
        images = torch.stack([torch.from_numpy(pixels(f)) for f in files]).permute(0, 3, 1, 2)
        scores[name] = reward(images / 255, texts)
        assert [row["scores"][name][REWARD] for row in found["images"]] == pytest.approx(
            scores[name].tolist(), abs=1e-6
        )
    gain = paired(scores["base"], scores["run"], tuple(texts))
    line = found["gains"]["all"]["run"][REWARD]
    assert line == pytest.approx({name: getattr(gain, name) for name in line}, abs=1e-6)
    assert gain.gain != 0
    assert found["means"]["all"]["base"][REWARD]["mean"] == pytest.approx(float(scores["base"].mean()), abs=1e-6)
    colours = torch.tensor([*range(3), *range(6, 9)])
    part = paired(scores["base"][colours], scores["run"][colours], tuple(texts[i] for i in colours))
    assert found["gains"]["colors"]["run"][REWARD]["gain"] == pytest.approx(part.gain, abs=1e-6)
    assert found["gains"]["counting"]["run"][REWARD]["se_by_prompt"] is None, "one prompt has no spread"
    assert [row["seed"] for row in found["images"]] == [i * 2**16 + n for i in range(3) for n in range(3)]
    assert found["call"] == {**CALL, "guidance_scale": 2.0}
    with (done / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(r[REWARD]) for r in lines if r["model"] == "run"] == pytest.approx(scores["run"].tolist(), abs=1e-6)
    text = (done / "table.md").read_text()
    assert f"{gain.gain:+.4f} ± {gain.se_by_prompt:.4f}" in text
    assert f"| colors: {REWARD} |" in text


def test_what_is_there_is_not_made_again_and_what_was_lost_is_the_same(
    there: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed: some images are there, one of them in a batch whose other image is not, one is torn."""
    output = tmp_path / "again"
    assert _files(shutil.copytree(done, output)) == _files(done)
    for file in ("base/00000/samples/0001.png", "run/00002/samples/0002.png", "evaluation.json", "table.md"):
        (output / file).unlink()
    (output / "base/00000/samples/0001.png.123.partial").write_bytes(b"\x89PNG")
    made, before = list[str](), {file: (output / file).stat().st_mtime_ns for file in _files(output)}
    load = model_variants.ModelVariant.load
    monkeypatch.setattr(model_variants.ModelVariant, "load", lambda v, *given: made.append(v.name) or load(v, *given))
    assert main(words(there, output, "--tuned", str(there / "adapters"))) == 0
    assert made == ["base", "run"], "a model whose images are there is not loaded"
    found = _files(output)
    same = {name: data for name, data in found.items() if "partial" not in name and name != "evaluation.json"}
    assert same == {name: data for name, data in _files(done).items() if name != "evaluation.json"}
    figures, again = (json.loads((folder / "evaluation.json").read_text()) for folder in (done, output))
    assert figures | {"asked": None} == again | {"asked": None}
    assert all((output / f).stat().st_mtime_ns == time for f, time in before.items() if f.endswith("0000.png"))
    said = capsys.readouterr().out
    assert "images of base: 9/9" in said
    assert "images of adapters" not in said


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_interruption_says_that_it_goes_on(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_comparison, "make_images", interrupted)
    assert main(words(there, tmp_path / "x")) == 130
    assert "the same command goes on" in capsys.readouterr().out


def test_another_evaluation_in_the_folder_is_refused_and_named(
    there: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(done, tmp_path / "other")
    monkeypatch.setattr(model_comparison, "_make_images", lambda *_: pytest.fail("images were made"))
    assert main(words(there, output, "--steps", "4", "--seed", "1")) == 1
    said = " ".join(capsys.readouterr().out.split())
    for part in ("seed: 0 there, 1 here", "'num_inference_steps': 3", "--overwrite"):
        assert part in said
    (output / "settings.json").unlink()
    assert main(words(there, output)) == 1
    assert "holds images of another evaluation" in capsys.readouterr().out
    assert (output / "base" / "00000" / "samples" / "0000.png").is_file()


def test_other_weights_under_the_same_name_are_seen(there: Path, tmp_path: Path) -> None:
    file = shutil.copytree(there / "run", tmp_path / "run") / "transformer" / "diffusion_pytorch_model.safetensors"
    version = model_variants.find_variants(Evaluate("x", (REWARD,), tuned=(str(tmp_path / "run"),)))[1]
    before = version.fingerprint()
    assert version.fingerprint() == before
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert version.fingerprint() != before


def test_what_a_name_stands_for(there: Path) -> None:
    named = {"run": "transformer", "run/transformer": "transformer", "adapters": "adapters", "model": "model"}
    for where, kind in named.items():
        found = model_variants.find_variants(Evaluate("x", (REWARD,), model="tiny", tuned=(str(there / where),)))[1]
        assert (found.kind, found.name) == (kind, where.split("/")[0])
    one = model_variants.find_variants(Evaluate("x", (REWARD,), tuned=(str(there / "adapters" / model_variants.LORA),)))
    assert [(v.kind, v.where) for v in one[:1]] == [("model", "tiny")]
    assert one[1].kind == "adapters"


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
def test_what_does_not_fit_is_told_before_an_image_is_made(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, said = WRONG[name]
    monkeypatch.setattr(components, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    given = words(there, tmp_path / "out")
    for flag, value in zip(*[iter(change(there))] * 2):
        if flag in given and flag not in ("--tuned", "--reward"):
            place = given.index(flag)
            del given[place : place + 2]
        given += [flag, value]
    assert main(given) == 1
    assert re.search(said, " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_images_is_named() -> None:
    from trajsurgery.evaluation.geneval_folders import make_images
    from trajsurgery.training.prompts import Prompt

    class Films:
        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"frames": [1]})()

    with pytest.raises(Exception, match="Films gave Output for 1 prompts"):
        make_images(Films(), {}, Path("nowhere"), [Sample(0, Prompt("x"), 0, 0)], 1)


@pytest.mark.slow
def test_the_embedded_world_is_judged_by_its_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompts", "tiny", "--reward", "tiny", "--limit", "6", "--images", "1", "--steps", "8", "--batch", "6"]
    assert main(["evaluate", *given, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(found["means"]["all"]["base"]) == {"tiny", "rules"}
    assert {row["scores"]["base"]["rules"] for row in found["images"]} <= {0.0, 1.0}
    assert found["means"]["all"]["base"]["tiny"]["mean"] > 0.2
    assert len(found["means"]) == 1 + 6
    assert not math.isnan(found["means"]["all"]["base"]["tiny"]["standard_error"])
    assert "position: rules" in capsys.readouterr().out
