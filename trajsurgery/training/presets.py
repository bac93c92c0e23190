"""The recipes of the other backbones: a Stable Diffusion 3, and a Wan that makes videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trajsurgery.training.objective import Objective
from trajsurgery.training.recipe import Method, Recipe, paper
from trajsurgery.training.settings import Evaluation, Optimiser, Rollout


def sd3(method: Method, output: str) -> dict[str, Recipe]:
    """A method on the embedded SD3, and on SD3.5-Medium with the paper's numbers (appendix B: 512 px, 200 iterations).

    Guidance is two passes of the transformer here, and both carry gradient. The embedded recipe's numbers are those of
    the embedded Flux, in fewer iterations, and guidance is one that leaves the base model head-room.
    """
    large = paper(method, f"{output}_paper")
    return {
        "tiny": Recipe(
            method=method,
            model="tiny:sd3",
            prompts="tiny:even",
            objective=Objective(threshold=0.45, tau=0.02),
            rollout=Rollout(guidance=1.5),
            optimiser=Optimiser(rate=3e-5),
            iterations=150,
            evaluation=Evaluation(pictures=480),
            output=Path(output),
        ),
        "paper": replace(
            large,
            model="stabilityai/stable-diffusion-3.5-medium",
            rollout=replace(large.rollout, size=512, at_once=4),
            iterations=200,
        ),
    }


def wan(method: Method, output: str) -> dict[str, Recipe]:
    """A method on the embedded Wan, which makes videos of one shape that is to move as the prompt says.

    The paper has no videos: there is no preset of its numbers.
    """
    return {
        "tiny": Recipe(
            method=method,
            model="tiny:wan",
            reward="trajsurgery.tiny.video_reward:MotionReward",
            prompts="tiny:wan",
            heldout="tiny:wan",
            objective=Objective(tau=0.02),
            rollout=Rollout(steps=15, batch=16, size=32, frames=5, guidance=2.0),
            optimiser=Optimiser(rate=1e-4),
            iterations=150,
            evaluation=Evaluation(images=240, steps=15, pictures=240),
            output=Path(output),
        ),
    }
