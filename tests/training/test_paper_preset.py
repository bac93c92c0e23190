"""Every number of the paper's section 6.1 and appendix E, typed here, is what the paper presets resolve to.

docs/how-to/paper-preset.md is this table for readers: `python -m tests.training.test_paper_preset` prints its rows.
"""

from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from trajsurgery import DRaFTLV, DRTune, LeapAlign, ReFL
from trajsurgery.evaluation.held_out import spread_over_categories
from trajsurgery.rewards.clip import PickScore
from trajsurgery.rewards.hpsv2 import HPSv2
from trajsurgery.rewards.hpsv3 import HPSv3
from trajsurgery.training.presets import presets, sd3
from trajsurgery.training.prompts import Prompt
from trajsurgery.training.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs/how-to/paper-preset.md"
SD3 = "SD3.5-M"
RECIPES = {
    "Flux": presets(LeapAlign(alpha=0.3), "outputs/x")["paper"],
    SD3: sd3(LeapAlign(alpha=0.3), "outputs/x")["paper"],
    "PickScore": presets(LeapAlign(alpha=0.3), "outputs/x")["paper-pickscore"],
    "HPSv3": presets(LeapAlign(alpha=0.3), "outputs/x")["paper-hpsv3"],
    "DRaFT-LV": presets(DRaFTLV(), "outputs/x")["paper"],
    "DRTune": presets(DRTune(), "outputs/x")["paper"],
    "ReFL": presets(ReFL(), "outputs/x")["paper"],
}
LAMBDA = {"hpsv2.1": HPSv2.threshold, "pickscore": PickScore.threshold, "hpsv3": HPSv3.threshold}


@dataclass(frozen=True)
class Row:
    """A number of the paper."""

    section: str
    what: str
    field: str
    """Of the recipe."""
    values: dict[str, Any]
    """{recipe: the paper's number}."""
    remark: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.values.items())
        return f"| {self.section} | {self.what} | `{self.field}` | {values} | {self.remark} |"


def both(flux: Any, sd3: Any = None) -> dict[str, Any]:
    """The numbers of Flux and of SD3.5-M, where appendix B gives another."""
    return {"Flux": flux, SD3: flux if sd3 is None else sd3}


ROWS = (
    Row("6.1, B", "model", "model", both("black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium")),
    Row(
        "6.1",
        "training prompts: 50,000 of HPDv2",
        "prompts",
        both("prompts/hpdv2_train.txt"),
        "your file; all of it is drawn from",
    ),
    Row("6.1", "test prompts: HPDv2's 400", "heldout", both("prompts/hpdv2_test.txt"), "your file"),
    Row("6.1", "four images a test prompt: 1600", "evaluation.images", both(1600)),
    Row(
        "6.1",
        "steps of the evaluation",
        "evaluation.steps",
        both(50),
        "size and guidance are the rollout's, as in the paper",
    ),
    Row("6.1", "reward", "reward", both("hpsv2.1")),
    Row(
        "6.1, E",
        "lambda",
        "objective.threshold",
        {"Flux": 0.55, SD3: 0.55, "PickScore": 0.4, "HPSv3": 13.5},
        "the reward's own, if `--objective.threshold` is left out",
    ),
    Row("6.1", "tau", "objective.tau", both(0.1)),
    Row("6.1", "all parameters of the transformer", "train.what", both("full")),
    Row("6.1", "AdamW", "optimiser.name", both("adamw")),
    Row("6.1, E", "learning rate", "optimiser.rate", {"Flux": 1e-5, SD3: 1e-5, "PickScore": 1e-5, "HPSv3": 8e-6}),
    Row("6.1", "beta_1, beta_2", "optimiser.betas", both((0.9, 0.999))),
    Row("6.1", "weight decay", "optimiser.weight_decay", both(1e-4)),
    Row("6.1", "batch size", "rollout.batch", both(64)),
    Row("6.1", "EMA decay", "ema", both(0.995)),
    Row("6.1, B", "iterations", "iterations", both(300, 200)),
    Row("6.1", "GPUs", "hardware.gpus", both(16), "what `--dry-run` plans for; any number gives the same run"),
    Row("6.1, B", "resolution", "rollout.size", both(720, 512)),
    Row("6.1", "steps of the rollout", "rollout.steps", both(25)),
    Row(
        "6.1", "guidance", "rollout.guidance", both(3.5), "an input of Flux; two passes of SD3.5-M, both with gradient"
    ),
    Row("E", "alpha", "method.alpha", {"Flux": 0.3, SD3: 0.3, "PickScore": 0.1, "HPSv3": 0.1}),
    Row("4.2", "leaps", "method.leaps", both(2)),
    Row("6.3", "k and j from the whole range, independent of each other", "method.window", both((0.0, 1.0))),
    Row("4.5", "similarity at both landings", "weights_at", both("all")),
    Row("E", "DRaFT-LV: n", "method.n", {"DRaFT-LV": 2}),
    Row("E", "DRTune: K", "method.train", {"DRTune": 2}),
    Row("E", "early stop among the last m of 25 steps", "method.last", {"DRTune": 11, "ReFL": 11}),
    Row(
        "E",
        "ReFL without its pre-training loss",
        "guards.anchor",
        {"ReFL": 0.0},
        "there is none here; the anchor is off",
    ),
    Row(
        "6.1",
        "MJHQ-30K without 500 test prompts, for HPSv3",
        "prompts",
        {"HPSv3": "prompts/mjhq_train.txt"},
        "your file",
    ),
    Row(
        "6.1",
        "MJHQ-30K's 500 test prompts",
        "heldout",
        {"HPSv3": "prompts/mjhq_test.txt"},
        "your file; four images each, as of HPDv2: the paper gives no number",
    ),
    Row(
        "-",
        "clipping of the gradient: not mentioned",
        "optimiser.clip",
        both(1.0),
        "ours: HPSv3's gradients are large, as appendix E says; `--optimiser.clip inf` does not clip",
    ),
    Row("-", "warm-up: not mentioned", "optimiser.warmup", both(0)),
    Row("-", "precision: not mentioned", "rollout.precision", both("bfloat16"), "ours: float32 weights under autocast"),
)


def resolved(recipe: Recipe, field: str) -> Any:
    """The field's value, with the reward's own lambda."""
    value = attrgetter(field)(recipe)
    return LAMBDA[recipe.reward] if field == "objective.threshold" and value is None else value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_the_preset_has_the_paper_s_number(row: Row) -> None:
    assert {name: resolved(RECIPES[name], row.field) for name in row.values} == row.values


def test_the_page_has_these_rows() -> None:
    assert [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:] == [str(row) for row in ROWS]


def test_1600_images_are_four_of_each_of_400_prompts() -> None:
    prompts = [
        Prompt(f"{style} {i}", style) for style in ("anime", "paintings", "photo", "concept-art") for i in range(100)
    ]
    drawn = spread_over_categories(prompts, RECIPES["Flux"].evaluation.images)
    assert set(Counter(prompt.text for prompt in drawn).values()) == {4}


if __name__ == "__main__":
    print("\n".join(map(str, ROWS)))
