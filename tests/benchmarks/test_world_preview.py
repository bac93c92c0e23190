"""The contact sheet: one noise for each column, images judged and scored; what can't be drawn is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks.world.preview import (
    GAP,
    Preview,
    draw_sheet,
    find_model,
    find_prompts,
    frames_side_by_side,
    main,
    run_settings,
)
from benchmarks.world.preview_models import PreviewModel, preview_model
from benchmarks.world.preview_models import video_model as wan_of
from trajsurgery import tiny
from trajsurgery.errors import RecipeError
from trajsurgery.tiny.prompt import CATEGORIES
from trajsurgery.tiny.video import DIRECTIONS

torch.set_num_threads(1)
SHORT = Preview(prompts=("a circle", "a red square and a green circle"), noises=3, steps=2)


@pytest.fixture(scope="module")
def flux() -> PreviewModel:
    return preview_model("flux")


def test_a_sheet_is_judged_and_scored_and_has_the_same_noise_in_every_row(flux: PreviewModel):
    prompts, done = find_prompts(SHORT, flux), []
    sheet = draw_sheet("base", flux, prompts, SHORT, lambda: done.append(1))
    assert len(done) == 2
    assert sheet.images.shape == (2, 3, 3, 32, 32)
    for row, prompt in enumerate(prompts):
        assert torch.equal(sheet.correct[row], tiny.judge(sheet.images[row], [prompt] * 3).correct)
        assert torch.allclose(sheet.reward[row], flux.reward(sheet.images[row], [prompt] * 3), atol=1e-5)
    alike = draw_sheet("base", flux, [prompts[1], prompts[1]], SHORT, lambda: None).images
    assert torch.equal(alike[0], alike[1])
    assert torch.equal(alike[0], sheet.images[1])
    assert not torch.allclose(alike[0, 0], alike[0, 1], atol=0.05), "columns are different noises"


def test_tuned_and_untuned_weights_are_drawn_side_by_side(
    flux: PreviewModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flux.pipe.transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "tiny"}))
    both = main(Preview(**{**vars(SHORT), "run": tmp_path}))
    lines = capsys.readouterr().out.splitlines()
    shares = {line.split(":")[0]: line.split(":")[1] for line in lines if "right" in line}
    assert shares["untuned"] == shares["tuned"], "the same weights draw the same pictures"
    assert both == tmp_path / "preview.png"
    base = main(Preview(**{**vars(SHORT), "output": tmp_path / "base.png"}))
    assert imread(both).shape[1] > imread(base).shape[1] > 300
    assert imread(both).std() > 0.05


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_other_models_are_drawn_with_the_settings_of_their_run(name: str, tmp_path: Path):
    run = tmp_path / name
    tiny.pipeline(name).transformer.save_pretrained(run / "transformer")  # pyright: ignore[reportArgumentType]
    (run / "recipe.json").write_text(json.dumps({"model": f"tiny:{name}", "rollout": {"guidance": 2.25}}))
    assert find_model(Preview(run=run)).call["guidance_scale"] == 2.25
    text = "a red circle moves right" if name == "wan" else "a circle"
    path = main(Preview(run=run, prompts=(text,), noises=1, steps=2))
    assert imread(path).std() > 0.05


def test_frames_are_drawn_side_by_side():
    frames = torch.rand(5, 3, 32, 32)
    strip = frames_side_by_side(frames)
    assert strip.shape == (3, 32, 5 * 32 + 4 * GAP)
    for i in range(5):
        assert torch.equal(strip[..., i * (32 + GAP) :][..., :32], frames[i])
    assert frames_side_by_side(frames[0]) is not None
    assert torch.equal(frames_side_by_side(frames[0]), frames[0])


def test_what_cannot_be_drawn_is_refused(flux: PreviewModel, tmp_path: Path):
    with pytest.raises(RecipeError, match="holds no tuned weights: let the run end"):
        run_settings(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "some/flux"}))
    with pytest.raises(RecipeError, match="a run of some/flux"):
        run_settings(tmp_path)
    with pytest.raises(RecipeError, match="no prompt 'a cat'"):
        find_prompts(Preview(prompts=("a cat",)), flux)
    with pytest.raises(RecipeError, match="noises and steps: at least 1"):
        Preview(noises=0, steps=0)


def test_all_categories_are_shown(flux: PreviewModel):
    prompts = find_prompts(Preview(each=2), flux)
    assert [prompt.category for prompt in prompts] == [c for c in CATEGORIES for _ in range(2)]
    many = find_prompts(Preview(each=1000), flux)
    assert len({prompt.text for prompt in many}) == len(many)
    moving = wan_of(None).evenly(2)
    assert [prompt.category for prompt in moving] == [d for d in DIRECTIONS for _ in range(2)]
