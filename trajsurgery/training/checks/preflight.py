"""Checks before a run: everything that is missing is reported at once, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path

import torch

from trajsurgery.errors import PlanError, RecipeError
from trajsurgery.plans.plan import Plan
from trajsurgery.rewards.loading import mixture_weights, reward_problem
from trajsurgery.rewards.packaged import is_differentiable
from trajsurgery.rewards.user_code import error_text
from trajsurgery.tiny.pipe import FOLDERS
from trajsurgery.training.averages import AVERAGE
from trajsurgery.training.distributed import ranks
from trajsurgery.training.model import model_folder
from trajsurgery.training.model.precision import KEPT, kept_in
from trajsurgery.training.optimisers import MOMENTS
from trajsurgery.training.prompts import read_prompts
from trajsurgery.training.recipe import EMBEDDED, Recipe
from trajsurgery.training.settings import ModelSource

PARAMETERS = {"black-forest-labs/FLUX.1-dev": 11_901_408_320, "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520}
"""Parameters of the transformers that the recipes name."""

WITHOUT_GPU = 10**9
"""The most parameters that may be trained on a CPU."""

_FLUX = (
    "One image of it at 720 px (bfloat16, measured under fake tensors) adds 33.3 GiB for the activations of "
    "LeapAlign's two model calls, 1.7 GiB with gradient checkpointing, 1.4 GiB at the staged sweep's peak; reward and "
    "VAE come on top."
)


def check_recipe(recipe: Recipe, given: Container[str] = ()) -> None:
    """Raise if the recipe can't run on this machine.

    Args:
        given: fields whose objects the caller has: they are not looked for.

    Raises:
        RecipeError: everything that is missing, what the run would need, and what to do.
    """
    rewards = () if "reward" in given else (recipe.reward,)
    problems = (
        _method_problem(recipe),
        *map(_judge_problem, rewards),
        _device_problem(recipe),
        None if "model" in given else model_problem(recipe.source),
        *map(reward_problem, dict.fromkeys((*rewards, *(recipe.evaluation.metrics or ())))),
        *_prompt_problems(recipe, given),
    )
    missing = [line for line in problems if line]
    if missing:
        raise RecipeError(
            "\n".join(["this recipe can't run here:", *(f"  - {line}" for line in missing), *_requirements(recipe)])
        )


def training_gib(recipe: Recipe) -> float | None:
    """Return GiB for weights, gradients, optimiser and averages, if the model's size is known; for frozen weights alone
    where adapters train.
    """
    count, weight = parameter_count(recipe.source), KEPT[kept_in(recipe)]
    averages = AVERAGE if recipe.ema_on == "device" else 0
    trained = weight + MOMENTS[recipe.optimiser.name] + averages if recipe.train.what == "full" else 0
    return None if count is None else (weight + trained) * count / 2**30


def parameter_count(source: ModelSource) -> int | None:
    """Return the transformer's number of parameters: of a known model, or from the headers of local files."""
    if source.name in PARAMETERS:
        return PARAMETERS[source.name]
    place = Path(source.transformer or Path(source.name, "transformer"))
    files = [place] if place.is_file() else model_folder.weight_files(place, source.variant)
    return sum(sum(map(math.prod, model_folder.shapes(file).values())) for file in files) or None


def _method_problem(recipe: Recipe) -> str | None:
    """Draw one plan, so that settings that allow none are reported before the first evaluation."""
    try:
        plan = recipe.method.draw(recipe.rollout.steps, torch.Generator().manual_seed(recipe.seed))
    except PlanError as error:
        return f"no plan: {recipe.method} on {recipe.rollout.steps} steps: {error}"
    except Exception as error:  # of a method of the user's own
        return f"no plan: {recipe.method} on {recipe.rollout.steps} steps raised {error_text(error)}."
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        return f"no plan: {recipe.method}.draw returned {type(plan).__name__}; it returns a trajsurgery.Plan."
    if recipe.rollout.plans > 1 and not plan.exact:
        return (
            f"--rollout.plans {recipe.rollout.plans}: plans share a rollout if the reward looks at its image, which "
            f"{recipe.method} does not give it ({plan}). Take LeapAlign, FlowBP, DRTune with --method.connected, or "
            "one plan a rollout."
        )
    return None


def _judge_problem(reward: str) -> str | None:
    """Report a reward, or a part of it, that answers in text and has no gradient."""
    try:
        judges = [name for name in mixture_weights(reward) or (reward,) if not is_differentiable(name)]
    except RecipeError:
        return None  # `reward_problem` reports it
    if not judges:
        return None
    return (
        f"--reward {reward}: {', '.join(judges)} answers in text and has no gradient, so nothing can be trained on "
        "it. Let it score, as one of --evaluation.metrics or with `trajsurgery score`."
    )


def _device_problem(recipe: Recipe) -> str | None:
    needed, count = training_gib(recipe), parameter_count(recipe.source)
    if needed is None or count is None or count <= WITHOUT_GPU:
        return None
    if not torch.cuda.is_available():
        return (
            f"no GPU: torch {torch.__version__} sees no CUDA device, and {recipe.model} needs {needed:.0f} GiB on one."
        )
    sharded = recipe.shard == "fsdp" or (recipe.shard == "auto" and recipe.train.what == "full")
    gpus = ranks.on_this_node() if sharded else 1
    have = torch.cuda.get_device_properties(0).total_memory / 2**30
    if have >= needed / gpus:
        return None
    return (
        f"the GPU has {have:.0f} GiB; training {recipe.model} needs {needed:.0f}, on {gpus} of a node "
        f"{needed / gpus:.0f} each. Start more processes (torchrun --nproc-per-node), or take --train.what lora."
    )


def model_problem(source: ModelSource) -> str | None:
    """Return what the recipe's model is missing here and how to fix it; None if nothing."""
    if source.name in EMBEDDED:
        stage = source.name.partition(":")[2] or "flux"
        command = f"python -m benchmarks.world.train --stage {stage}, then --stage ship"
        problem = f"no weights: {source.name} is not in this package. Make them: {command}."
        return None if FOLDERS[stage].is_dir() else problem
    return model_folder.model_problem(source, (*EMBEDDED, *PARAMETERS))


def _prompt_problems(recipe: Recipe, given: Container[str]) -> list[str]:
    flags = {"prompts": ("training", recipe.prompts), "heldout": ("held-out", recipe.heldout)}
    if recipe.guards.every is not None and recipe.guards.prompts is not None:
        flags["guards.prompts"] = ("validation", recipe.guards.prompts)
    embedded = (*EMBEDDED.values(), "tiny:even")
    problems = {
        flag: (kind, prompts_problem(path))
        for flag, (kind, path) in flags.items()
        if path not in embedded and flag not in given
    }
    return [
        f"no {kind} prompts: {problem} Pass --{flag} FILE." for flag, (kind, problem) in problems.items() if problem
    ]


def prompts_problem(path: str) -> str | None:
    """Return why no prompts can be read from a file; None if they can."""
    try:
        read_prompts(path)
    except RecipeError as error:
        return str(error)
    return None


def _requirements(recipe: Recipe) -> list[str]:
    needed, count, lines = training_gib(recipe), parameter_count(recipe.source), list[str]()
    if needed is not None and count is not None and count > WITHOUT_GPU:
        full = "weights, gradients, moments and averages, shared by the GPUs of a node (the paper used 16)"
        lines.append(
            f"What it needs: {count / 1e9:.1f} G parameters kept in {kept_in(recipe)}: {needed:.0f} GiB for "
            f"{full if recipe.train.what == 'full' else 'frozen weights, beside the adapters'}."
        )
    if count == PARAMETERS["black-forest-labs/FLUX.1-dev"]:
        lines.append(_FLUX)
    if recipe.preset == "paper":
        lines.append("The same recipe without --preset paper runs on any CPU in minutes, on the embedded world.")
    return lines
