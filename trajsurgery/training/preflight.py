"""Whether a recipe's run can start here: everything that is missing is said at once, before anything is loaded."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch

from trajsurgery.errors import PlanError, RecipeError
from trajsurgery.rewards.by_name import terms
from trajsurgery.rewards.named import KNOWN, known, lacking, trainable
from trajsurgery.tiny.pipe import FOLDERS
from trajsurgery.tiny.variant import shipped
from trajsurgery.training import model_folder
from trajsurgery.training.prompts import read_prompts
from trajsurgery.training.recipe import EMBEDDED, Recipe

PARAMETERS = {"black-forest-labs/FLUX.1-dev": 11_901_408_320, "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520}
"""Of the transformers that recipes name."""

WITHOUT_GPU = 10**9
"""Parameters that can be trained on a CPU, if one is patient."""

COPIES = 5
"""Float32 copies of the parameters in training: weights, gradients, AdamW's two moments, EMA."""

_FLUX = (
    "One image of it at 720 px (bfloat16, measured under fake tensors) adds 33.3 GiB for the activations of "
    "LeapAlign's two model calls, 1.7 GiB with gradient checkpointing, 1.4 GiB at the staged sweep's peak; reward and "
    "VAE come on top."
)


def check(recipe: Recipe) -> None:
    """Stops a run that can't start.

    Raises:
        RecipeError: what is missing, what the run would need, and what to do.
    """
    scorers = dict.fromkeys((recipe.reward, *(recipe.evaluation.metrics or ())))
    named = lacking_model(recipe.model), *map(lacking_reward, scorers)
    found = (_method(recipe), _judge(recipe.reward), _device(recipe), *named, *_prompts(recipe))
    missing = [line for line in found if line]
    if missing:
        raise RecipeError(
            "\n".join(["this recipe can't run here:", *(f"  - {line}" for line in missing), *_needs(recipe)])
        )


def gibibytes(recipe: Recipe) -> float | None:
    """The memory of parameters, gradients, optimiser and EMA, if the model's size is known; adapters are small."""
    count, copies = parameters(recipe.model), COPIES if recipe.train.what == "full" else 1
    return None if count is None else copies * 4 * count / 2**30


def parameters(model: str) -> int | None:
    """The number of the transformer's parameters: of the named ones, and of a local folder's, read off its headers."""
    if model in PARAMETERS:
        return PARAMETERS[model]
    files = sorted(Path(model, "transformer").glob("*.safetensors"))
    return sum(map(_elements, files)) if files else None


def _elements(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def _method(recipe: Recipe) -> str | None:
    """Draws one plan: settings that allow none would else be told after the first evaluation."""
    try:
        plan = recipe.method.draw(recipe.rollout.steps, torch.Generator().manual_seed(recipe.seed))
    except PlanError as error:
        return f"no plan: {recipe.method} on {recipe.rollout.steps} steps: {error}"
    if recipe.rollout.plans > 1 and not plan.exact:
        return (
            f"--rollout.plans {recipe.rollout.plans}: plans share a rollout if the reward looks at its image, which "
            f"{recipe.method} does not give it ({plan}). Take LeapAlign, FlowBP, DRTune with --method.connected, or "
            "one plan a rollout."
        )
    return None


def _judge(asked: str) -> str | None:
    """A reward, or a part of it, that answers in text."""
    try:
        judges = [name for name in terms(asked) or (asked,) if not trainable(name)]
    except RecipeError:
        return None  # `lacking_reward` says it
    if not judges:
        return None
    return (
        f"--reward {asked}: {', '.join(judges)} answers in text and has no gradient, so that nothing can be trained on "
        "it. Let it grade, as one of --evaluation.metrics or with `trajsurgery score`."
    )


def _device(recipe: Recipe) -> str | None:
    needed, count = gibibytes(recipe), parameters(recipe.model)
    if needed is None or count is None or count <= WITHOUT_GPU:
        return None
    if not torch.cuda.is_available():
        return (
            f"no GPU: torch {torch.__version__} sees no CUDA device, and {recipe.model} needs {needed:.0f} GiB on one."
        )
    have = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (
        None
        if have >= needed
        else f"the GPU has {have:.0f} GiB; training {recipe.model} on one device needs {needed:.0f}."
    )


def lacking_model(name: str) -> str | None:
    """What a recipe's `model` lacks here, and the repair; None if nothing."""
    if name in EMBEDDED:
        stage = name.partition(":")[2] or "flux"
        command = f"python -m benchmarks.world.train --stage {stage}, then --stage ship"
        return None if FOLDERS[stage].is_dir() else f"no weights: {name} is not in this package. Make them: {command}."
    return model_folder.incomplete(name)


def lacking_reward(asked: str) -> str | None:
    """What a recipe's `reward` lacks here, and the repair; None if nothing."""
    try:
        mixed = terms(asked)
    except RecipeError as error:
        return str(error)
    if mixed:
        return " ".join(said for part in mixed if (said := lacking_reward(part))) or None
    name, _, rest = asked.partition(":")
    if name == "tiny":
        there = ("", "scorer", *shipped())
        return None if rest in there else f"no reward {asked!r}: the embedded world ships tiny{' tiny:'.join(there)}."
    if known(asked):
        return lacking(asked)
    try:
        there = bool(rest) and find_spec(name) is not None
    except (ImportError, ValueError):
        there = False
    return None if there else f"no reward {asked!r}: it is tiny, tiny:SCORER, {KNOWN}, or MODULE:NAME."


def _prompts(recipe: Recipe) -> list[str]:
    flags = {"prompts": ("training", recipe.prompts), "heldout": ("held-out", recipe.heldout)}
    if recipe.guards.every is not None and recipe.guards.prompts is not None:
        flags["guards.prompts"] = ("validation", recipe.guards.prompts)
    known = (*EMBEDDED.values(), "tiny:even")
    found = {flag: (kind, unreadable(path)) for flag, (kind, path) in flags.items() if path not in known}
    return [f"no {kind} prompts: {said} Pass --{flag} FILE." for flag, (kind, said) in found.items() if said]


def unreadable(path: str) -> str | None:
    """Why no prompts can be read from a file; None if they can."""
    try:
        read_prompts(path)
    except RecipeError as error:
        return str(error)
    return None


def _needs(recipe: Recipe) -> list[str]:
    needed, count, lines = gibibytes(recipe), parameters(recipe.model), list[str]()
    if needed is not None and count is not None and count > WITHOUT_GPU:
        lines.append(
            f"What it needs: {count / 1e9:.1f} G parameters, all of them trained, in float32: "
            f"{needed:.0f} GiB for weights, gradients, AdamW's two moments and EMA, on one device (the paper used 16 "
            "GPUs; sharding is not there yet)."
        )
    if count == PARAMETERS["black-forest-labs/FLUX.1-dev"]:
        lines.append(_FLUX)
    if recipe.preset == "paper":
        lines.append("The same recipe without --preset paper runs on any CPU in minutes, on the embedded world.")
    return lines
