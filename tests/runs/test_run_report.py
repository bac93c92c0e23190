"""Reports of a run: paired statistics, pictures, closing remarks, and the output of `main`."""

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
from trajsurgery.runs.reports import run_report
from trajsurgery.runs.reports.validation_report import smoothed
from trajsurgery.training.checkpoints.checkpoint import resume
from trajsurgery.training.checkpoints.run_log import METRICS, Log
from trajsurgery.training.checkpoints.training_state import TrainingState
from trajsurgery.training.prompts import Prompt


def scores(reward: Sequence[float], correct: Sequence[bool] | None = None, texts: str = "") -> HeldOutScores:
    """Held-out scores of one image for each reward; the categories a and b alternate."""
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
    statistics = paired(before, before + 0.1 + 0.01 * noise, tuple(map(str, range(400))))
    assert statistics.gain == pytest.approx(0.1, abs=0.003)
    assert statistics.se == pytest.approx(0.01 * float(noise.std()) / 20, rel=1e-4)
    assert statistics.se_by_prompt == pytest.approx(statistics.se, rel=1e-3)


def test_images_of_one_prompt_are_not_independent() -> None:
    """Ten prompts of forty images with one gain for each prompt: the standard error is that of ten numbers."""
    gains = torch.randn(10, generator=torch.Generator().manual_seed(1)).double()
    clusters = tuple(str(i % 10) for i in range(400))
    statistics = paired(torch.zeros(400), gains.repeat(40), clusters)
    assert statistics.se_by_prompt == pytest.approx(float(gains.std()) / math.sqrt(10), rel=1e-6)
    assert statistics.se < statistics.se_by_prompt / 5


def test_a_single_image_has_no_standard_error() -> None:
    statistics = paired(torch.zeros(1), torch.ones(1), ("a",))
    assert math.isnan(statistics.se)
    assert math.isnan(statistics.se_by_prompt)
    assert run_report.verdict({"reward_gain": 1.0, "reward_gain_se": math.nan}) == "held-out reward +1.0000"


def test_the_comparison_has_the_keys_that_ci_reads() -> None:
    comparison = compare(
        scores([0.1, 0.2, 0.3, 0.4], [True, False, False, False]), scores([0.2] * 4, [True, True, True, False])
    )
    expected = {
        f"{name}_{when}" for name in ("reward", "rule", "junk") for when in ("before", "after", "gain", "gain_se")
    }
    assert {"kind", "images", "categories", *expected} <= comparison.keys()
    assert (comparison["rule_before"], comparison["rule_after"], comparison["rule_gain"]) == (0.25, 0.75, 0.5)
    assert comparison["categories"]["a"]["images"] == 2
    assert comparison["categories"]["b"]["rule_after"] == 0.5
    assert comparison["reward_gain"] == pytest.approx(-0.05)
    assert in_standard_errors(comparison) == pytest.approx(-0.05 / comparison["reward_gain_se"])


def test_without_rules_only_the_reward_is_compared() -> None:
    comparison = compare(scores([0.1, 0.2]), scores([0.3, 0.3]))
    assert "rule_gain" not in comparison
    assert "junk_before" not in comparison
    run_report.results_table(comparison)
    assert "rule" not in run_report.verdict(comparison)


def test_further_scorers_are_compared_as_the_reward_is() -> None:
    correct = [True, False, False, True]
    before = replace(scores([0.1, 0.2, 0.3, 0.4], correct), metrics={"x:Y": torch.tensor([0.0, 0.1, 0.2, 0.6])})
    after = replace(
        scores([0.2, 0.2, 0.5, 0.5], correct), metrics={"x:Y": torch.tensor([0.1, 0.1, 0.0, 0.6]), "new": before.reward}
    )
    comparison = compare(before, after)
    assert comparison["metrics"].keys() == {"x:Y"}, "only scorers of both evaluations"
    line = comparison["metrics"]["x:Y"]
    assert line["reward_gain"] == pytest.approx(-0.025)
    assert line["reward_gain_se"] == paired(before.metrics["x:Y"], after.metrics["x:Y"], before.texts).se
    assert line["calibration"]["before"]["auc"] == pytest.approx(0.5)
    printed = io.StringIO()
    Console(file=printed, width=110).print(run_report.results_table(comparison), *run_report.remarks(comparison))
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
    single_images = {"pixels": torch.full((6,), nan)}
    unmeasured = compare(replace(before, apart=single_images), replace(after, apart=single_images))
    assert unmeasured["diversity"] == {}
    assert "not measured" in run_report.remarks(unmeasured)[-1]


def test_records_of_earlier_versions_are_still_reported() -> None:
    comparison = compare(scores([0.1, 0.2]), scores([0.3, 0.3]))
    old = {name: value for name, value in comparison.items() if name not in ("metrics", "diversity")}
    assert run_report.results_table(old).row_count == run_report.results_table(comparison).row_count
    assert run_report.remarks(old) == []
    record = scores([0.1, 0.2]).to_dict()
    assert HeldOutScores.from_dict({n: v for n, v in record.items() if n not in ("metrics", "apart")}).metrics == {}


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        compare(scores([1.0, 2.0], texts="xy"), scores([1.0, 2.0], texts="yx"))


def test_prompts_are_spread_over_the_categories() -> None:
    prompts = [*(Prompt(f"a{i}", "a") for i in range(3)), Prompt("b0", "b"), *(Prompt(f"c{i}", "c") for i in range(40))]
    spread = spread_over_categories(prompts, 12)
    assert [prompt.category for prompt in spread] == list("abc") * 4
    assert [prompt.text for prompt in spread if prompt.category == "a"] == ["a0", "a1", "a2", "a0"]
    assert spread == spread_over_categories(prompts, 100)[:12]


def test_an_evaluation_is_repeatable(tmp_path: Path) -> None:
    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    first, second = evaluate(recipe, world), evaluate(recipe, world)
    assert torch.equal(first.reward, second.reward)
    assert torch.equal(first.pictures, second.pictures)
    assert len(first.pictures) == recipe.evaluation.pictures
    assert not torch.equal(first.reward, evaluate(replace(recipe, seed=5), world).reward)
    assert first.correct is not None
    expected = toy_world.rules(first.pictures / 255, first.texts[:4])[0]
    assert torch.equal(first.correct[:4], expected)
    assert HeldOutScores.from_dict(first.to_dict()).texts == first.texts


def test_further_scorers_score_the_images_that_the_reward_scores(tmp_path: Path) -> None:
    class MeanColour(toy_world.LikesRed):
        def features(self, images: Tensor) -> Tensor:
            return images.mean((-1, -2))

    recipe = toy_world.recipe(tmp_path)
    world = toy_world.world(recipe)
    metrics = {
        "plain": toy_world.LikesRed(),
        "sees": MeanColour(),
        "double": lambda images, texts: 2 * world.reward(images, texts),
    }
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, pictures=10))
    result = evaluate(recipe, replace(world, metrics=metrics))
    assert torch.equal(result.metrics["plain"], result.reward)
    assert torch.equal(result.metrics["double"], 2 * result.reward)
    assert result.apart.keys() == {"pixels", "sees"}
    images = result.pictures / 255
    for i, text in enumerate(result.texts):
        others = [j for j, other in enumerate(result.texts) if other == text and j != i]
        if not others:
            assert result.apart["pixels"][i].isnan()
            continue
        gaps = (images[i] - images[others]).square().mean((1, 2, 3)).sqrt()
        assert result.apart["pixels"][i] == pytest.approx(float(gaps.mean()), abs=2e-3)
        colours = images.mean((-1, -2))
        expected = 1 - torch.cosine_similarity(colours[i], colours[others], dim=-1)
        assert result.apart["sees"][i] == pytest.approx(float(expected.mean()), abs=1e-3)
    restored = HeldOutScores.from_dict(result.to_dict())
    assert torch.allclose(restored.apart["sees"], result.apart["sees"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(restored.metrics["double"], result.metrics["double"])


def test_smoothing_keeps_a_constant_and_the_ends() -> None:
    assert smoothed([2.0] * 30) == pytest.approx([2.0] * 30)
    assert smoothed([1.0]) == [1.0]
    assert smoothed([]) == []


def test_shown_pictures_are_the_first_ones_and_some_whose_rule_changed() -> None:
    correct = [i % 3 == 0 for i in range(20)]
    changed = [(not r) if i in (1, 9, 12, 15, 16) else r for i, r in enumerate(correct)]
    indices, remark = run_report.choose_pictures(scores([0.1] * 20, correct), scores([0.2] * 20, changed), 8)
    assert indices == [0, 1, 2, 3, 16, 9, 12]
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
    correct = [i % 3 == 0 for i in range(40)] if rules else None
    before, after = scores([i / 40 for i in range(40)], correct), scores([i / 50 + 0.1 for i in range(40)], correct)
    comparison = compare(before, after)
    record = json.loads(json.dumps(comparison))
    picture = imread(run_report.draw_held_out(tmp_path / "heldout.png", "title", record))
    assert picture.shape[1] == (1650 if rules else 900)
    assert picture.std() > 0.02


def run_main(recipe: Any, terminal: bool, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Run `main`; return what it prints and what it returns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=110)
    summary = main(recipe, replace(toy_world.world(recipe), **changes), console)
    assert summary is not None
    return out.getvalue(), summary


@pytest.mark.parametrize("terminal", [False, True])
def test_main_writes_its_files_and_prints_the_results(tmp_path: Path, terminal: bool) -> None:
    recipe = toy_world.recipe(tmp_path)
    printed, summary = run_main(recipe, terminal)
    for name in ("reward.png", "samples.png", "heldout.png", "plan.svg", "metrics.jsonl", "recipe.json"):
        assert (tmp_path / name).stat().st_size > 100
    lines = Log(tmp_path / METRICS).read()
    assert [line["kind"] for line in lines] == ["iteration"] * 6 + ["evaluation"]
    assert lines[-1] == json.loads(json.dumps(summary))
    assert summary["images"] == 10
    assert summary["reward_gain"] > 3 * summary["reward_gain_se"]
    assert summary["seconds"] >= sum(line["seconds"] for line in lines[:-1]) - 0.1
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
    run_main(recipe, False)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    world = toy_world.world(recipe)
    training = TrainingState.start(recipe, world.module)
    assert resume(recipe, training)
    for value, average, p in zip(loaded.parameters(), training.ema.shadow_params, training.parameters, strict=True):
        assert torch.equal(value, average)
        assert not torch.equal(average, p)


def test_skipped_iterations_are_reported(tmp_path: Path) -> None:
    class NaNOnce(toy_world.LikesRed):
        done = False

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            scores = super().__call__(images, prompts)
            with_gradient = (
                images.requires_grad and len(images) > 2
            )  # the check before the run has one, a contact sheet two
            first, self.done = with_gradient and not self.done, self.done or with_gradient
            return scores * math.nan if first else scores

    printed, summary = run_main(toy_world.recipe(tmp_path), True, reward=NaNOnce())
    assert summary["skipped"] == 1
    assert "skipped 1" in printed
    assert "skipped iterations: 1" in printed
