"""What a recipe's names stand for: a pipeline, a reward, prompts, and rules if there are some. Resolved when asked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trajsurgery.errors import RecipeError
from trajsurgery.rewards.by_name import Reward, ask, scorer, terms
from trajsurgery.training import lora, model_folder, vae_decoding
from trajsurgery.training.objective import DETACHED
from trajsurgery.training.prompt_cache import Embeddings, dismiss
from trajsurgery.training.prompts import Prompt, read_prompts
from trajsurgery.training.recipe import EMBEDDED, Recipe

Judge = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
"""judge(images, prompts) -> (correct Bool[batch], junk Float[batch], a share of pixels): rules no reward has seen."""

Draw = Callable[[int, torch.Generator], list[str]]
"""draw(count, generator) -> training prompts."""


@dataclass(frozen=True, eq=False)
class RunComponents:
    """Everything a run needs that is not a number."""

    pipe: Any
    """A diffusers pipeline whose `transformer` trains; everything else in it is frozen."""
    reward: Reward
    texts: tuple[str, ...]
    """All training prompts."""
    draw: Draw
    heldout: tuple[Prompt, ...]
    judge: Judge | None = None
    metrics: Mapping[str, Reward] = field(default_factory=dict[str, Reward])
    """Further scorers by name: they grade the held-out images, and no gradient climbs them."""
    validation: tuple[Prompt, ...] = ()
    """Prompts that are neither trained on nor held out: what is looked at while it trains (guards.py)."""

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.pipe.transformer.device


def call_of(recipe: Recipe) -> dict[str, Any]:
    """The arguments that every call of a recipe's pipe gets, in training and evaluation."""
    rollout = recipe.rollout
    height, width = rollout.shape or (None, None)
    found = {"guidance_scale": rollout.guidance, "height": height, "width": width}
    return found if rollout.frames is None else {**found, "num_frames": rollout.frames}


def texts_of(recipe: Recipe, world: RunComponents, generator: torch.Generator) -> list[str]:
    """The prompts of one iteration's images, those of one prompt side by side."""
    shared = recipe.rollout.per_prompt
    return [text for text in world.draw(recipe.rollout.batch // shared, generator) for _ in range(shared)]


def encode(recipe: Recipe, world: RunComponents, asked: Iterable[str], draws: Iterable[torch.Generator]) -> None:
    """Encodes all prompts that a run asks for, and lets the text encoders go.

    Args:
        asked: those of its evaluations.
        draws: the generators with which the run's iterations draw their prompts.
    """
    texts = [*asked, *(text for draw in draws for text in texts_of(recipe, world, draw))]
    Embeddings(world.pipe, texts, call_of(recipe))
    if not recipe.train.keep_encoders:
        dismiss(world.pipe)


def load(recipe: Recipe) -> RunComponents:
    """The world of a recipe.

    Raises:
        RecipeError: a name that stands for nothing; `training.preflight.check` reports all of them, and sooner.
    """
    with quiet():
        pipe = frozen(pipeline(recipe.model), recipe)
        scorers = {name: scorer(name, pipe.transformer.device) for name in (recipe.reward, *held_out_scorers(recipe))}
    texts, draw = _training(recipe)
    known = _embedded(recipe.heldout)
    if known is not None:
        asked = tuple(Prompt(str(p.text), str(p.category)) for p in known.prompts(recipe.evaluation.split))
    else:
        asked = read_prompts(recipe.heldout)
    judge = None if known is None or EMBEDDED.get(recipe.model) != recipe.heldout else _rules(known.judge)
    reward = scorers.pop(recipe.reward)
    return RunComponents(pipe, reward, texts, draw, asked, judge, scorers, _validation(recipe, known))


def _validation(recipe: Recipe, known: Any) -> tuple[Prompt, ...]:
    """The prompts of the looks: those of the file that the recipe names, else the embedded world's."""
    if recipe.guards.every is None:
        return ()
    if recipe.guards.prompts is not None:
        return read_prompts(recipe.guards.prompts)
    return () if known is None else tuple(Prompt(str(p.text), str(p.category)) for p in known.prompts("validation"))


def held_out_scorers(recipe: Recipe) -> tuple[str, ...]:
    """Names of the scorers that grade held-out images beside the reward; by default those of the embedded world."""
    named = recipe.evaluation.metrics
    if named is not None:
        return tuple(dict.fromkeys(named))
    if recipe.model not in ("tiny", "tiny:sd3") or recipe.heldout != "tiny":
        return ()
    known = ("tiny", *(f"tiny:{name}" for name in import_module("trajsurgery.tiny.variant").shipped()))
    return tuple(name for name in known if name not in (recipe.reward, *terms(recipe.reward)))


@contextmanager
def quiet() -> Generator[None]:
    """Loading without bars, and without open_clip's remark that a model is made before its weights are read."""
    from diffusers.utils import logging as bars
    from transformers.utils import logging as more_bars

    def remarkable(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    logging.getLogger().addFilter(remarkable)
    shown = bars.is_progress_bar_enabled(), more_bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    more_bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger().removeFilter(remarkable)
        for part, before in zip((bars, more_bars), shown):
            if before:
                part.enable_progress_bar()


def frozen(pipe: Any, recipe: Recipe) -> Any:
    """The pipe, silent, in whose transformer trains what the recipe says, and nothing else."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    lora.choose(pipe.transformer, recipe.train)
    if recipe.rollout.checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if recipe.rollout.compile:
        pipe.transformer.forward = torch.compile(pipe.transformer.forward)
    autocast = recipe.rollout.precision == "bfloat16"
    if autocast:
        _autocast(pipe.transformer)
    if getattr(pipe, "vae", None) is not None:
        vae_decoding.prepare(pipe.vae, recipe.decoder, autocast)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _autocast(module: nn.Module) -> None:
    """Runs a module in bfloat16 over float32 weights; latents, decoder and reward stay float32."""
    forward, kind = module.forward, next(module.parameters()).device.type

    @functools.wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, torch.bfloat16):
            found = forward(*args, **kwargs)
        return tree_map(lambda v: v.float() if isinstance(v, Tensor) else v, found)

    module.forward = cast


def pipeline(model: str) -> Any:
    """The pipeline of a recipe's `model`, on the GPU if there is one: what trains and its VAE in float32."""
    world, _, name = model.partition(":")
    if world == "tiny":
        return import_module("trajsurgery.tiny").pipeline(name or "flux")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if missing := model_folder.incomplete(model):  # of a missing tokenizer transformers makes an empty one
        raise RecipeError(missing)
    cuda = torch.cuda.is_available()
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=_dtypes(cuda), local_files_only=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{model} can't be loaded: {error} Fetch it anew with `hf download`.") from error
    return pipe.to("cuda" if cuda else "cpu")


def _dtypes(cuda: bool) -> Any:
    """The text encoders are frozen and large; what trains, and a VAE that overflows in bfloat16, stay float32."""
    small = torch.bfloat16 if cuda else torch.float32
    return {"text_encoder": small, "text_encoder_2": small, "text_encoder_3": small, "default": torch.float32}


def _embedded(prompts: str) -> Any:
    """The module that has prompts and rules of a world of the package; None for a file."""
    places = {"tiny": "trajsurgery.tiny", "tiny:even": "trajsurgery.tiny", "tiny:wan": "trajsurgery.tiny.video_rules"}
    return import_module(places[prompts]) if prompts in places else None


def _training(recipe: Recipe) -> tuple[tuple[str, ...], Draw]:
    known = _embedded(recipe.prompts)
    if known is not None:
        texts = tuple(str(p.text) for p in known.prompts("train"))
        ratio = {"ratio": known.EVEN_RATIO} if recipe.prompts == "tiny:even" else {}
        return texts, lambda count, g: [str(p.text) for p in known.prompts("train", generator=g, count=count, **ratio)]
    texts = tuple(prompt.text for prompt in read_prompts(recipe.prompts))
    return texts, lambda count, g: [texts[i] for i in torch.randint(len(texts), (count,), generator=g).tolist()]


def _rules(judge: Any) -> Judge:
    def judged(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        verdict = judge(images, list(texts))
        return verdict.correct, verdict.junk

    return judged


def threshold(recipe: Recipe, world: RunComponents) -> float:
    """lambda: the recipe's, else the reward's own.

    Raises:
        RecipeError: neither has one.
    """
    own = recipe.objective.threshold
    found = own if own is not None else getattr(world.reward, "threshold", None)
    if found is None:
        raise RecipeError(
            f"reward {recipe.reward!r} states no threshold: give the hinge its lambda with --objective.threshold, on "
            "the reward's own scale and below the highest score that is to be rewarded."
        )
    return float(found)


def trial(recipe: Recipe, world: RunComponents) -> None:
    """Asks the reward for the score of a grey image or video: what it lacks is told before hours of sampling.

    Raises:
        RecipeError: no threshold; no score for each image; a reward's scores without a gradient to the images.
    """
    threshold(recipe, world)
    size = recipe.rollout.shape or (64, 64)
    shape = (1, *([] if recipe.rollout.frames is None else [recipe.rollout.frames]), 3, *size)
    image = torch.full(shape, 0.5, device=world.device, requires_grad=True)
    scores = ask(recipe.reward, world.reward, image, world.texts[0])
    reached = torch.autograd.grad(scores.sum(), image, allow_unused=True)[0] if scores.requires_grad else None
    if reached is None:
        raise RecipeError(DETACHED)
    for name, metric in world.metrics.items():
        ask(name, metric, image.detach(), world.texts[0])
