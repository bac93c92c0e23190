"""The presets of recipes: Flux on the embedded world (the demo), the paper's run, one card; SD3, and Wan for videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trajsurgery import methods
from trajsurgery.training.recipe import Method, Recipe
from trajsurgery.training.settings import Decoder, Evaluation, Hardware, Objective, Optimiser, Rollout, Trained

IN_TABLE_3 = methods.LeapAlign, methods.ReFL, methods.DRaFTLV, methods.DRTune


def paper(method: Method, output: str) -> Recipe:
    """FLUX.1-dev with the paper's numbers (section 6.1, appendix E), HPSv2.1 as the reward, whose lambda it states.

    `docs/how-to/paper-preset.md` lists them, and what the paper leaves open.
    """
    return Recipe(
        preset="paper",
        method=method,
        model="black-forest-labs/FLUX.1-dev",
        reward="hpsv2.1",
        prompts="prompts/hpdv2_train.txt",
        heldout="prompts/hpdv2_test.txt",
        objective=Objective(tau=0.1),
        rollout=Rollout(
            steps=25,
            batch=64,
            at_once=2,  # what the float32 decode leaves room for on 16 GPUs of 80 GB: the dry run
            size=720,
            guidance=3.5,
            memory="staged",
            checkpointing=True,
            precision="bfloat16",
        ),
        gather="layer",  # all weights and a gradient of all of them take 67 GiB
        optimiser=Optimiser(rate=1e-5, betas=(0.9, 0.999), weight_decay=1e-4),
        iterations=300,
        evaluation=Evaluation(images=1600, steps=50, batch=4),
        hardware=Hardware(gpus=16),
        output=Path(output),
    )


def other_rewards(large: Recipe) -> dict[str, Recipe]:
    """Return the paper's run with PickScore, and with HPSv3 on MJHQ-30K (Table 3), with appendix E's numbers."""
    method = replace(large.method, alpha=0.1) if isinstance(large.method, methods.LeapAlign) else large.method
    pickscore = replace(large, preset="paper-pickscore", method=method, reward="pickscore")
    hpsv3 = replace(
        pickscore,
        preset="paper-hpsv3",
        reward="hpsv3",
        prompts="prompts/mjhq_train.txt",
        heldout="prompts/mjhq_test.txt",
        optimiser=replace(large.optimiser, rate=8e-6),
        evaluation=replace(large.evaluation, images=2000),
    )
    output = str(large.output).removesuffix("_paper")
    return {recipe.preset: replace(recipe, output=Path(f"{output}_{recipe.preset}")) for recipe in (pickscore, hpsv3)}


def on_one_card(large: Recipe) -> dict[str, Recipe]:
    """Return a large recipe as presets for one GPU, which `--dry-run` finds to fit."""
    rollout = replace(large.rollout, at_once=1, memory="split")
    decoder = Decoder(precision="bfloat16", checkpointing=True)
    one = replace(large, rollout=rollout, decoder=decoder, hardware=Hardware())
    adapters = replace(one, train=Trained("lora", rank=32), optimiser=replace(large.optimiser, rate=1e-4))
    cards: dict[Any, Recipe] = {
        "lora-24gb": replace(
            adapters,
            train=replace(adapters.train, base="nf4"),
            rollout=replace(rollout, memory="staged"),
            decoder=replace(decoder, tiling=512),
            hardware=Hardware(memory=24e9, flops=165e12),
        ),
        "lora-80gb": adapters,
        "full-80gb": replace(
            one,
            train=Trained(weights="bfloat16"),
            optimiser=replace(large.optimiser, name="adamw8bit"),
            ema_on="cpu",
            hardware=Hardware(memory=83e9),
        ),
    }
    return {name: replace(card, preset=name, output=Path(f"{large.output}_{name}")) for name, card in cards.items()}


def presets(method: Method, output: str) -> dict[str, Recipe]:
    """The recipes of a method: on the embedded world, the paper's on 16 GPUs, and the same on one.

    Methods that the paper trained with other rewards have its recipes for these, too.

    The embedded world's settings were chosen on validation prompts (benchmarks/demo/choose_settings.py): its rate in
    this world.
    """
    return {
        "tiny": replace(
            Recipe(),
            method=method,
            prompts="tiny:even",
            objective=Objective(threshold=0.45, tau=0.02),
            iterations=170,  # under five minutes on one slow core
            evaluation=Evaluation(pictures=480, sheet_every=75),
            output=Path(output),
        ),
        "paper": paper(method, f"{output}_paper"),
        **(other_rewards(paper(method, f"{output}_paper")) if isinstance(method, IN_TABLE_3) else {}),
        **on_one_card(paper(method, output)),
    }


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
            evaluation=Evaluation(pictures=480, sheet_every=75),
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
