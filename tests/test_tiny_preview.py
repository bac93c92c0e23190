"""The contact sheet: same noise in all rows and for both models, judged and scored; what it can't draw is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from trajsurgery import tiny
from trajsurgery.errors import RecipeError
from trajsurgery.tiny.preview import Preview, chosen, main, sheet, tuned
from trajsurgery.tiny.prompt import CATEGORIES

torch.set_num_threads(1)
SHORT = Preview(prompts=("a circle", "a red square and a green circle"), noises=3, steps=2)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def test_a_sheet_is_judged_and_scored_and_has_the_same_noise_in_every_row(pipe):
    reward, prompts, done = tiny.Reward(), chosen(SHORT), []
    found = sheet("base", pipe, reward, prompts, SHORT, lambda: done.append(1))
    assert len(done) == 2
    assert found.images.shape == (2, 3, 3, 32, 32)
    for row, prompt in enumerate(prompts):
        assert torch.equal(found.correct[row], tiny.judge(found.images[row], [prompt] * 3).correct)
        assert torch.allclose(found.reward[row], reward(found.images[row], [prompt] * 3), atol=1e-5)
    alike = sheet("base", pipe, reward, [prompts[1], prompts[1]], SHORT, lambda: None).images
    assert torch.equal(alike[0], alike[1])
    assert torch.equal(alike[0], found.images[1])
    assert not torch.allclose(alike[0, 0], alike[0, 1], atol=0.05), "columns are different noises"


def test_tuned_weights_are_drawn_beside_the_untuned(pipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "tiny"}))
    both = main(Preview(**{**vars(SHORT), "run": tmp_path}))
    lines = capsys.readouterr().out.splitlines()
    told = {line.split(":")[0]: line.split(":")[1] for line in lines if "right" in line}
    assert told["untuned"] == told["tuned"], "the same weights draw the same pictures"
    assert both == tmp_path / "preview.png"
    base = main(Preview(**{**vars(SHORT), "output": tmp_path / "base.png"}))
    assert imread(both).shape[1] > imread(base).shape[1] > 300
    assert imread(both).std() > 0.05


def test_what_it_cannot_draw_is_said(tmp_path: Path):
    with pytest.raises(RecipeError, match="holds no tuned weights: let the run end"):
        tuned(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "tiny:sd3"}))
    with pytest.raises(RecipeError, match="a run of tiny:sd3"):
        tuned(tmp_path)
    with pytest.raises(RecipeError, match="no prompt 'a cat'"):
        chosen(Preview(prompts=("a cat",)))
    with pytest.raises(RecipeError, match="noises and steps: at least 1"):
        Preview(noises=0, steps=0)


def test_all_categories_are_shown():
    prompts = chosen(Preview(each=2))
    assert [prompt.category for prompt in prompts] == [c for c in CATEGORIES for _ in range(2)]
    assert len({prompt.text for prompt in chosen(Preview(each=1000))}) == len(chosen(Preview(each=1000)))
