"""Pipeline, rewards and prompts of a run, loaded from the names in its recipe."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from trajsurgery.errors import RecipeError
from trajsurgery.rewards.loading import Reward, load_reward, mixture_weights, on_device, quiet_rewards, score_one
from trajsurgery.training.distributed import ranks, sharding
from trajsurgery.training.encodings.prompt_cache import PromptCache, free_text_encoders, open_folder
from trajsurgery.training.model import attention, compilation, lora, precision, vae_decoding
from trajsurgery.training.model.pipeline_loading import load_pipeline as load_pipeline
from trajsurgery.training.objective import DETACHED
from trajsurgery.training.prompts import Prompt, read_prompts
from trajsurgery.training.recipe import EMBEDDED, Recipe

Judge = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
"""judge(images, prompts) -> (correct Bool[batch], junk Float[batch], a share of pixels): rules no reward has seen."""

Draw = Callable[[int, torch.Generator], list[str]]
"""draw(count, generator) -> training prompts."""


@dataclass(frozen=True, eq=False)
class RunComponents:
    """Pipeline, rewards and prompts of a run."""

    pipe: Any
    """A diffusers pipeline whose `transformer` trains; everything else is frozen."""
    reward: Reward
    texts: tuple[str, ...]
    """All training prompts."""
    draw: Draw
    heldout: tuple[Prompt, ...]
    judge: Judge | None = None
    metrics: Mapping[str, Reward] = field(default_factory=dict[str, Reward])
    """Further scorers by name. They score held-out images and are never trained on."""
    validation: tuple[Prompt, ...] = ()
    """Prompts for validation rounds, which are neither trained on nor held out."""

    @property
    def module(self) -> nn.Module:
        """The module that trains."""
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        """The device it trains on."""
        return self.pipe.transformer.device


def pipeline_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of every pipeline call of a run, in training and evaluation."""
    rollout = recipe.rollout
    height, width = rollout.shape or (None, None)
    arguments = {"guidance_scale": rollout.guidance, "height": height, "width": width}
    return arguments if rollout.frames is None else {**arguments, "num_frames": rollout.frames}


def draw_batch_prompts(recipe: Recipe, world: RunComponents, generator: torch.Generator) -> list[str]:
    """Draw the prompts of one iteration; images of one prompt stand side by side."""
    shared = recipe.rollout.per_prompt
    return [text for text in world.draw(recipe.rollout.batch // shared, generator) for _ in range(shared)]


def open_prompt_cache(recipe: Recipe, world: RunComponents) -> None:
    """From now on write encoded prompts to the recipe's folder, and read them from it, if it names one."""
    if recipe.prompt_folder is not None:
        open_folder(world.pipe, recipe.prompt_folder, recipe.prompt_cache_limit)


def encode_prompts(
    recipe: Recipe, world: RunComponents, asked: Iterable[str], draws: Iterable[torch.Generator]
) -> None:
    """Encode all prompts of a run, then free the text encoders unless the recipe keeps them.

    Args:
        asked: prompts of its evaluations.
        draws: the generators from which the iterations draw their prompts.
    """
    texts = [*asked, *(text for draw in draws for text in draw_batch_prompts(recipe, world, draw))]
    PromptCache(world.pipe, texts, pipeline_arguments(recipe))
    if not recipe.train.keep_encoders:
        free_text_encoders(world.pipe)


def load(
    recipe: Recipe,
    pipe: Any = None,
    reward: Reward | None = None,
    texts: Sequence[str] | None = None,
    heldout: tuple[Prompt, ...] | None = None,
) -> RunComponents:
    """Load what the recipe names, but for what is given.

    Args:
        pipe: a diffusers pipeline; it is prepared as the recipe says.
        texts: training prompts, which are drawn uniformly.

    Raises:
        RecipeError: an unknown name; `preflight.check_recipe` reports all of them, and sooner.
    """
    with quiet():
        if pipe is None:
            pipe = load_pipeline(recipe.source, ranks.choose_device(recipe.device), recipe.train)
        pipe = prepare_pipeline(pipe, recipe)
        device = pipe.transformer.device
        scorer = load_reward(recipe.reward, device) if reward is None else on_device(reward, device)
        scorers = {name: load_reward(name, device) for name in held_out_scorers(recipe)}
    training_texts, draw_texts = _training_prompts(recipe) if texts is None else _uniform(texts)
    world = _embedded_world(recipe.heldout)
    if heldout is not None:
        pass
    elif world is not None:
        heldout = tuple(Prompt(str(p.text), str(p.category)) for p in world.prompts(recipe.evaluation.split))
    else:
        heldout = read_prompts(recipe.heldout)
    judge = None if world is None or EMBEDDED.get(recipe.model) != recipe.heldout else _rule_judge(world.judge)
    if recipe.compile_reward:
        compilation.compile_image_tower(recipe.reward, scorer)
    validation = _validation_prompts(recipe, world)
    return RunComponents(pipe, scorer, training_texts, draw_texts, heldout, judge, scorers, validation)


def _validation_prompts(recipe: Recipe, world: Any) -> tuple[Prompt, ...]:
    """Return the prompts of validation rounds: those that `guards.prompts` names, else the embedded world's."""
    source = recipe.guards.prompts
    if recipe.guards.every is None:
        return ()
    if source is not None and (world := _embedded_world(source)) is None:
        return read_prompts(source)
    return () if world is None else tuple(Prompt(str(p.text), str(p.category)) for p in world.prompts("validation"))


def held_out_scorers(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the scorers beside the reward; by default those of the embedded world."""
    named = recipe.evaluation.metrics
    if named is not None:
        return tuple(dict.fromkeys(named))
    if recipe.model not in ("tiny", "tiny:sd3") or recipe.heldout != "tiny":
        return ()
    embedded = ("tiny", *(f"tiny:{name}" for name in import_module("trajsurgery.tiny.scorer").shipped()))
    return tuple(name for name in embedded if name not in (recipe.reward, *mixture_weights(recipe.reward)))


@contextmanager
def quiet() -> Generator[None]:
    """Load pipelines and rewards without progress bars and needless warnings."""
    from diffusers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with quiet_rewards():
            yield
    finally:
        if shown:
            bars.enable_progress_bar()


def prepare_pipeline(pipe: Any, recipe: Recipe) -> Any:
    """Freeze the pipeline, set what trains, and configure precision, checkpointing and the VAE as the recipe says.

    It ends on the recipe's device; of several ranks each has its shard or copy of the transformer.
    """
    device = ranks.choose_device(recipe.device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if precision.kept_dtype(recipe) == torch.bfloat16 and not precision.is_quantised(recipe.train):
        precision.to_bfloat16(pipe.transformer)
    lora.set_trainable(pipe.transformer, recipe.train, recipe.seed)
    if recipe.rollout.checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if recipe.rollout.compile:
        compilation.compile_blocks(pipe.transformer)
    sharding.distribute(pipe.transformer, recipe, device)
    pipe.to(device)
    low = recipe.rollout.precision == "bfloat16"
    if low and precision.kept_dtype(recipe) == torch.float32:
        precision.run_in_bfloat16(pipe.transformer)
    attention.choose(pipe.transformer, recipe.attention, device)
    if getattr(pipe, "vae", None) is not None:
        vae_decoding.prepare_vae(pipe.vae, recipe.decoder, low)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embedded_world(prompts: str) -> Any:
    """Return the module with prompts and rules of an embedded world; None for a file."""
    places = {"tiny": "trajsurgery.tiny", "tiny:even": "trajsurgery.tiny", "tiny:wan": "trajsurgery.tiny.video_rules"}
    return import_module(places[prompts]) if prompts in places else None


def _training_prompts(recipe: Recipe) -> tuple[tuple[str, ...], Draw]:
    world = _embedded_world(recipe.prompts)
    if world is not None:
        texts = tuple(str(p.text) for p in world.prompts("train"))
        ratio = {"ratio": world.EVEN_RATIO} if recipe.prompts == "tiny:even" else {}
        return texts, lambda count, g: [str(p.text) for p in world.prompts("train", generator=g, count=count, **ratio)]
    return _uniform([prompt.text for prompt in read_prompts(recipe.prompts)])


def _uniform(texts: Sequence[str]) -> tuple[tuple[str, ...], Draw]:
    """Return training prompts that are drawn uniformly, and the function that draws them."""

    def draw(count: int, generator: torch.Generator) -> list[str]:
        return [str(texts[i]) for i in torch.randint(len(texts), (count,), generator=generator).tolist()]

    return tuple(texts), draw


def _rule_judge(judge: Any) -> Judge:
    def judged(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        verdict = judge(images, list(texts))
        return verdict.correct, verdict.junk

    return judged


def hinge_threshold(recipe: Recipe, world: RunComponents) -> float:
    """Return lambda: the recipe's, else the reward's own.

    Raises:
        RecipeError: neither states one.
    """
    setting = recipe.objective.threshold
    threshold = setting if setting is not None else getattr(world.reward, "threshold", None)
    if threshold is None:
        raise RecipeError(
            f"reward {recipe.reward!r} states no threshold: give the hinge its lambda with --objective.threshold, on "
            "the reward's own scale and below the highest score that is to be rewarded."
        )
    return float(threshold)


def check_reward(recipe: Recipe, world: RunComponents) -> None:
    """Score a grey image or video once, so that a faulty reward is reported before hours of sampling.

    Raises:
        RecipeError: no threshold, no score for each image, or scores without gradient.
    """
    hinge_threshold(recipe, world)
    size = recipe.rollout.shape or (64, 64)
    shape = (1, *([] if recipe.rollout.frames is None else [recipe.rollout.frames]), 3, *size)
    image = torch.full(shape, 0.5, device=world.device, requires_grad=True)
    scores = score_one(recipe.reward, world.reward, image, world.texts[0])
    gradient = torch.autograd.grad(scores.sum(), image, allow_unused=True)[0] if scores.requires_grad else None
    if gradient is None:
        raise RecipeError(DETACHED)
    for name, metric in world.metrics.items():
        score_one(name, metric, image.detach(), world.texts[0])
