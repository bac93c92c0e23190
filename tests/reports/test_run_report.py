"""What a run reports: paired statistics, the pictures, the closing words, and the whole of `main`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor

from tests.builders import toy_world
from trajsurgery.cli.train_command import main
from trajsurgery.evaluation.held_out import HeldOutScores, evaluate, spread_over_categories
from trajsurgery.evaluation.paired_statistics import compare, in_standard_errors, paired
from trajsurgery.reports import run_report
from trajsurgery.reports.validation_report import smoothed
from trajsurgery.training.checkpoint import METRICS, Log, TrainingState
from trajsurgery.training.prompts import Prompt


def scores(reward: Sequence[float], correct: Sequence[bool] | None = None, texts: str = "") -> HeldOutScores:
    """A record of as many images as rewards; every other one is of category b."""
    count = len(reward)
    return HeldOutScores(
        tuple(texts or map(str, range(count))),
        tuple("ab"[i % 2] for i in range(count)),
        torch.tensor(reward),
        None if correct is None else torch.tensor(correct),
        None if correct is None else torch.zeros(count),
        torch.randint(255, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    )


def test_gains_are_paired() -> None:
    before, noise = torch.randn(400), torch.randn(400)
    found = paired(before, before + 0.1 + 0.01 * noise, tuple(map(str, range(400))))
    assert found.gain == pytest.approx(0.1, abs=0.003)
    assert found.se == pytest.approx(0.01 * float(noise.std()) / 20, rel=1e-4)
    assert found.se_by_prompt == pytest.approx(found.se, rel=1e-3)


def test_images_of_one_prompt_are_not_independent() -> None:
    """Ten prompts, forty images each, whose gains differ by prompt alone: the spread is that of ten numbers."""
    gains = torch.randn(10, generator=torch.Generator().manual_seed(1)).double()
    clusters = tuple(str(i % 10) for i in range(400))
    found = paired(torch.zeros(400), gains.repeat(40), clusters)
    assert found.se_by_prompt == pytest.approx(float(gains.std()) / math.sqrt(10), rel=1e-6)
    assert found.se < found.se_by_prompt / 5


def test_a_single_image_has_no_standard_error() -> None:
    found = paired(torch.zeros(1), torch.ones(1), ("a",))
    assert math.isnan(found.se)
    assert math.isnan(found.se_by_prompt)


def test_the_evaluation_has_the_names_that_ci_reads() -> None:
    found = compare(
        scores([0.1, 0.2, 0.3, 0.4], [True, False, False, False]), scores([0.2] * 4, [True, True, True, False])
    )
    wanted = {
        f"{name}_{when}" for name in ("reward", "rule", "junk") for when in ("before", "after", "gain", "gain_se")
    }
    assert {"kind", "images", "categories", *wanted} <= found.keys()
    assert (found["rule_before"], found["rule_after"], found["rule_gain"]) == (0.25, 0.75, 0.5)
    assert found["categories"]["a"]["images"] == 2
    assert found["categories"]["b"]["rule_after"] == 0.5
    assert found["reward_gain"] == pytest.approx(-0.05)
    assert in_standard_errors(found) == pytest.approx(-0.05 / found["reward_gain_se"])


def test_without_rules_there_is_the_reward_alone() -> None:
    found = compare(scores([0.1, 0.2]), scores([0.3, 0.3]))
    assert "rule_gain" not in found
    assert "junk_before" not in found
    run_report.results_table(found)
    assert "rule" not in run_report.verdict(found)


def test_further_scorers_are_compared_as_the_reward_is() -> None:
    right = [True, False, False, True]
    before = replace(scores([0.1, 0.2, 0.3, 0.4], right), metrics={"x:Y": torch.tensor([0.0, 0.1, 0.2, 0.6])})
    after = replace(
        scores([0.2, 0.2, 0.5, 0.5], right), metrics={"x:Y": torch.tensor([0.1, 0.1, 0.0, 0.6]), "new": before.reward}
    )
    found = compare(before, after)
    assert found["metrics"].keys() == {"x:Y"}, "only what was asked both times"
    line = found["metrics"]["x:Y"]
    assert line["reward_gain"] == pytest.approx(-0.025)
    assert line["reward_gain_se"] == paired(before.metrics["x:Y"], after.metrics["x:Y"], before.texts).se
    assert line["calibration"]["before"]["auc"] == pytest.approx(0.5)
    printed = io.StringIO()
    Console(file=printed, width=110).print(run_report.results_table(found), *run_report.remarks(found))
    assert "scorer x:Y" in printed.getvalue()
    assert "AUC 0.500 ->" in printed.getvalue()


def test_diversity_is_of_images_of_one_prompt_and_its_error_is_by_prompt() -> None:
    nan = math.nan
    texts = "aabbbc"
    before = replace(scores([0.1] * 6, texts=texts), apart={"pixels": torch.tensor([0.2, 0.2, 0.3, 0.5, 0.4, nan])})
    after = replace(before, apart={"pixels": torch.tensor([0.1, 0.1, 0.3, 0.4, 0.2, nan])})
    line = compare(before, after)["diversity"]["pixels"]
    assert (line["images"], line["prompts"]) == (5, 2)
    assert line["diversity_before"] == pytest.approx(1.6 / 5)
    assert line["diversity_gain"] == pytest.approx(-0.1)
    assert line["diversity_gain_se"] == line["diversity_gain_se_by_prompt"]
    alone = {"pixels": torch.full((6,), nan)}
    none = compare(replace(before, apart=alone), replace(after, apart=alone))
    assert none["diversity"] == {}
    assert "not measured" in run_report.remarks(none)[-1]


def test_records_of_an_earlier_version_are_still_told() -> None:
    found = compare(scores([0.1, 0.2]), scores([0.3, 0.3]))
    old = {name: value for name, value in found.items() if name not in ("metrics", "diversity")}
    assert run_report.results_table(old).row_count == run_report.results_table(found).row_count
    assert run_report.remarks(old) == []
    bare = scores([0.1, 0.2]).to_dict()
    assert HeldOutScores.from_dict({n: v for n, v in bare.items() if n not in ("metrics", "apart")}).metrics == {}


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        compare(scores([1.0, 2.0], texts="xy"), scores([1.0, 2.0], texts="yx"))


def test_prompts_are_spread_over_the_categories() -> None:
    asked = [*(Prompt(f"a{i}", "a") for i in range(3)), Prompt("b0", "b"), *(Prompt(f"c{i}", "c") for i in range(40))]
    found = spread_over_categories(asked, 12)
    assert [prompt.category for prompt in found] == list("abc") * 4
    assert [prompt.text for prompt in found if prompt.category == "a"] == ["a0", "a1", "a2", "a0"]
    assert found == spread_over_categories(asked, 100)[:12]


def test_an_evaluation_is_the_same_whenever_it_is_asked(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    first, again = evaluate(recipe, world), evaluate(recipe, world)
    assert torch.equal(first.reward, again.reward)
    assert torch.equal(first.pictures, again.pictures)
    assert len(first.pictures) == recipe.evaluation.pictures
    assert not torch.equal(first.reward, evaluate(replace(recipe, seed=5), world).reward)
    assert first.correct is not None
    wanted = toy_world.rules(first.pictures / 255, first.texts[:4])[0]
    assert torch.equal(first.correct[:4], wanted)
    assert HeldOutScores.from_dict(first.to_dict()).texts == first.texts


def test_further_scorers_grade_the_images_that_the_reward_grades(tmp_path: Path) -> None:
    class Sees(toy_world.LikesRed):
        def features(self, images: Tensor) -> Tensor:
            return images.mean((-1, -2))

    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    further = {
        "plain": toy_world.LikesRed(),
        "sees": Sees(),
        "double": lambda images, texts: 2 * world.reward(images, texts),
    }
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, pictures=10))
    found = evaluate(recipe, replace(world, metrics=further))
    assert torch.equal(found.metrics["plain"], found.reward)
    assert torch.equal(found.metrics["double"], 2 * found.reward)
    assert found.apart.keys() == {"pixels", "sees"}
    images = found.pictures / 255
    for i, text in enumerate(found.texts):
        others = [j for j, other in enumerate(found.texts) if other == text and j != i]
        if not others:
            assert found.apart["pixels"][i].isnan()
            continue
        gaps = (images[i] - images[others]).square().mean((1, 2, 3)).sqrt()
        assert found.apart["pixels"][i] == pytest.approx(float(gaps.mean()), abs=2e-3)
        colours = images.mean((-1, -2))
        wanted = 1 - torch.cosine_similarity(colours[i], colours[others], dim=-1)
        assert found.apart["sees"][i] == pytest.approx(float(wanted.mean()), abs=1e-3)
    again = HeldOutScores.from_dict(found.to_dict())
    assert torch.allclose(again.apart["sees"], found.apart["sees"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.metrics["double"], found.metrics["double"])


def test_smoothing_keeps_a_constant_and_the_ends() -> None:
    assert smoothed([2.0] * 30) == pytest.approx([2.0] * 30)
    assert smoothed([1.0]) == [1.0]
    assert smoothed([]) == []


def test_the_pictures_shown_are_not_chosen() -> None:
    right = [i % 3 == 0 for i in range(20)]
    turned = [(not r) if i in (1, 9, 12, 15, 16) else r for i, r in enumerate(right)]
    places, remark = run_report.choose_pictures(scores([0.1] * 20, right), scores([0.2] * 20, turned), 8)
    assert places == [0, 1, 2, 3, 16, 9, 12]
    assert "2 to right, 3 to wrong of 20" in remark
    assert run_report.choose_pictures(scores([0.1] * 20), scores([0.2] * 20), 8)[0] == list(range(8))


def test_pictures_are_drawn(tmp_path: Path) -> None:
    before, after = scores([0.1, 0.2, 0.3], [True, False, True]), scores([0.2, 0.4, 0.3], [True, True, False])
    picture = imread(run_report.draw_samples(tmp_path / "samples.png", "title", before, after))
    assert picture.shape[1] > picture.shape[0] > 200
    film = run_report._pixels(torch.zeros(5, 3, 4, 4, dtype=torch.uint8))  # pyright: ignore[reportPrivateUsage]
    assert film.shape == (4, 5 * 4 + 4, 3)
    assert [i for i in range(24) if film[0, i, 0]] == [4, 9, 14, 19], "white between frames"
    lines = [{"kind": "iteration", "iteration": i, "reward": None if i == 3 else i / 10} for i in range(1, 9)]
    for records in (lines, [*lines, compare(before, after)], lines[:1]):
        assert imread(run_report.draw_curve(tmp_path / "reward.png", "title", records)).std() > 0.02


@pytest.mark.parametrize("rules", [True, False])
def test_the_held_out_picture_is_drawn_with_and_without_rules(tmp_path: Path, rules: bool) -> None:
    right = [i % 3 == 0 for i in range(40)] if rules else None
    before, after = scores([i / 40 for i in range(40)], right), scores([i / 50 + 0.1 for i in range(40)], right)
    found = compare(before, after)
    lines = json.loads(json.dumps(found))
    picture = imread(run_report.draw_held_out(tmp_path / "heldout.png", "title", lines))
    assert picture.shape[1] == (1650 if rules else 900)
    assert picture.std() > 0.02


def said(recipe: Any, terminal: bool, **changes: Any) -> tuple[str, dict[str, Any]]:
    """What `main` prints, and what it returns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=110)
    found = main(recipe, replace(toy_world.world(recipe), **changes), console)
    assert found is not None
    return out.getvalue(), found


@pytest.mark.parametrize("terminal", [False, True])
def test_main_leaves_everything_there_is_to_see(tmp_path: Path, terminal: bool) -> None:
    recipe = toy_world.recipe(tmp_path)
    printed, found = said(recipe, terminal)
    for name in ("reward.png", "samples.png", "heldout.png", "plan.svg", "metrics.jsonl", "recipe.json"):
        assert (tmp_path / name).stat().st_size > 100
    lines = Log(tmp_path / METRICS).read()
    assert [line["kind"] for line in lines] == ["iteration"] * 6 + ["evaluation"]
    assert lines[-1] == json.loads(json.dumps(found))
    assert found["images"] == 10
    assert found["reward_gain"] > 3 * found["reward_gain_se"]
    assert found["seconds"] >= sum(line["seconds"] for line in lines[:-1]) - 0.1
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe.to_dict()
    words = (
        "paired SE",
        "rule-based score",
        "junk pixels",
        "standard errors",
        "samples.png",
        "LeapAlign",
        "diversity, pixels",
    )
    for word in (*words, "AUC", "the rules find"):
        assert word in printed


def test_the_weights_written_are_the_averaged_ones_and_diffusers_loads_them(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    said(recipe, False)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)
    training.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for value, average, p in zip(loaded.parameters(), training.ema.shadow_params, training.parameters, strict=True):
        assert torch.equal(value, average)
        assert not torch.equal(average, p)


def test_skipped_iterations_are_said(tmp_path: Path) -> None:
    class Once(toy_world.LikesRed):
        done = False

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            found = super().__call__(images, prompts)
            trains = images.requires_grad and len(images) > 1  # a single one is the trial's
            first, self.done = trains and not self.done, self.done or trains
            return found * math.nan if first else found

    printed, found = said(toy_world.recipe(tmp_path), True, reward=Once())
    assert found["skipped"] == 1
    assert "skipped 1" in printed
    assert "skipped iterations: 1" in printed
