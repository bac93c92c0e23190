"""What a recipe's names stand for: a pipeline, a reward, prompts, and rules if there are some. Resolved when asked."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trajsurgery.errors import RecipeError
from trajsurgery.objective import DETACHED
from trajsurgery.recipe import Recipe

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""reward(images, prompts): Float[batch 3 h w] in [0, 1] and a text for each, to scores Float[batch], differentiable."""

Judge = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
"""judge(images, prompts) -> (correct Bool[batch], junk Float[batch], a share of pixels): rules no reward has seen."""

Draw = Callable[[int, torch.Generator], list[str]]
"""draw(count, generator) -> training prompts."""

ENCODINGS = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    3: ("prompt_embeds", "pooled_prompt_embeds", None),
    4: ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
}
"""The names under which a pipeline's call takes what its `encode_prompt` returns, by their number (Wan; Flux; SD3)."""


@dataclass(frozen=True)
class Asked:
    """A held-out prompt."""

    text: str
    category: str = "all"


@dataclass(frozen=True, eq=False)
class World:
    """Everything a run needs that is not a number."""

    pipe: Any
    """A diffusers pipeline whose `transformer` trains; everything else in it is frozen."""
    reward: Reward
    texts: tuple[str, ...]
    """All training prompts."""
    draw: Draw
    heldout: tuple[Asked, ...]
    judge: Judge | None = None

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.pipe.transformer.device


class Embeddings:
    """The encodings of prompts, each made once; no text encoder runs afterwards.

    They are kept on the CPU (4 MiB a prompt for FLUX.1-dev's 512 tokens); a batch of them goes to the pipe's device.
    """

    def __init__(self, pipe: Any, texts: Sequence[str], batch: int = 64) -> None:
        unique = list(dict.fromkeys(texts))
        self._like = pipe.transformer.device, pipe.transformer.dtype
        self._row = {text: row for row, text in enumerate(unique)}
        with torch.no_grad():
            parts = [_encode(pipe, unique[i : i + batch]) for i in range(0, len(unique), batch)]
        self._tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The keyword arguments of the pipe's call for these prompts, each [len(texts), ...]."""
        rows = torch.tensor([self._row[text] for text in texts])
        return {name: values[rows].to(*self._like) for name, values in self._tensors.items()}


def _encode(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    parameters = inspect.signature(pipe.encode_prompt).parameters
    given: dict[str, Any] = {n: None for n, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    if "max_sequence_length" in parameters:
        given["max_sequence_length"] = _length(pipe)
    found = pipe.encode_prompt(**given | {"prompt": texts})
    if len(found) not in ENCODINGS:
        raise RecipeError(
            f"{type(pipe).__name__}.encode_prompt returned {len(found)} values; of Wan (2), Flux (3) and SD3 (4) are "
            "known: add the names under which its call takes them to trajsurgery.world.ENCODINGS."
        )
    return {
        name: value.cpu()
        for name, value in zip(ENCODINGS[len(found)], found, strict=True)
        if name and value is not None
    }


def _length(pipe: Any) -> int:
    """The number of tokens that the pipe's own call encodes, but no more than its T5 tokenizer says."""
    default = inspect.signature(pipe.__call__).parameters["max_sequence_length"].default
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if getattr(pipe, name, None) is not None]
    return min(default, getattr(pipe, names[0]).model_max_length) if names else default


def call_of(recipe: Recipe) -> dict[str, Any]:
    """The arguments that every call of a recipe's pipe gets, in training and evaluation."""
    rollout = recipe.rollout
    found = {"guidance_scale": rollout.guidance, "height": rollout.size, "width": rollout.size}
    return found if rollout.frames is None else {**found, "num_frames": rollout.frames}


def load(recipe: Recipe) -> World:
    """The world of a recipe.

    Raises:
        RecipeError: a name that stands for nothing; `trajsurgery.preflight.check` says it sooner and for all at once.
    """
    with quiet():
        pipe = frozen(_pipeline(recipe), recipe)
        reward = _reward(recipe, pipe.transformer.device)
    tiny: Any = import_module("trajsurgery.tiny") if "tiny" in (recipe.prompts, recipe.heldout) else None
    texts, draw = _training(recipe, tiny)
    if recipe.heldout == "tiny":
        asked = tuple(Asked(str(p.text), str(p.category)) for p in tiny.prompts(recipe.evaluation.split))
    else:
        asked = tuple(Asked(text) for text in read_prompts(recipe.heldout))
    judge = _rules(tiny.judge) if recipe.model in ("tiny", "tiny:sd3") and recipe.heldout == "tiny" else None
    return World(pipe, reward, texts, draw, asked, judge)


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
    """The pipe, silent, with a transformer that trains and nothing else that does."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipe.transformer.requires_grad_(True)
    if recipe.rollout.checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if recipe.rollout.precision == "bfloat16":
        _autocast(pipe.transformer)
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


def _pipeline(recipe: Recipe) -> Any:
    world, _, name = recipe.model.partition(":")
    if world == "tiny":
        return import_module("trajsurgery.tiny").pipeline(name or "flux")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    cuda = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(recipe.model, dtype=_dtypes(cuda), local_files_only=True)
    return pipe.to("cuda" if cuda else "cpu")


def _dtypes(cuda: bool) -> Any:
    """The text encoders are frozen and large; what trains, and a VAE that overflows in bfloat16, stay float32."""
    small = torch.bfloat16 if cuda else torch.float32
    return {"text_encoder": small, "text_encoder_2": small, "text_encoder_3": small, "default": torch.float32}


def _training(recipe: Recipe, tiny: Any) -> tuple[tuple[str, ...], Draw]:
    if recipe.prompts == "tiny":
        texts = tuple(str(p.text) for p in tiny.prompts("train"))
        return texts, lambda count, g: [str(p.text) for p in tiny.prompts("train", generator=g, count=count)]
    texts = tuple(read_prompts(recipe.prompts))
    return texts, lambda count, g: [texts[i] for i in torch.randint(len(texts), (count,), generator=g).tolist()]


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        RecipeError: no such file, or none in it.
    """
    if not Path(path).is_file():
        raise RecipeError(f"there is no file {path!r}: prompts are tiny, or a text file with one a line.")
    found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise RecipeError(f"{path!r} holds no prompt: write one a line.")
    return found


def _reward(recipe: Recipe, device: torch.device) -> Reward:
    name, _, rest = recipe.reward.partition(":")
    if name == "tiny":
        return import_module("trajsurgery.tiny").Reward()
    if name == "hpsv2.1":
        return import_module("trajsurgery.rewards.hpsv2").HPSv2(rest or None).to(device)
    try:
        return getattr(import_module(name), rest)()
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"reward = {recipe.reward!r} could not be made ({error}): it is tiny, hpsv2.1, hpsv2.1:FILE or "
            "MODULE:NAME, which is called without arguments and returns reward(images, prompts) -> scores."
        ) from error


def _rules(judge: Any) -> Judge:
    def judged(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        verdict = judge(images, list(texts))
        return verdict.correct, verdict.junk

    return judged


def threshold(recipe: Recipe, world: World) -> float:
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


def trial(recipe: Recipe, world: World) -> None:
    """Asks the reward for the score of one grey image: what it lacks is told before images are sampled for hours.

    Raises:
        RecipeError: no threshold; no score for each image; scores without a gradient to the images.
    """
    threshold(recipe, world)
    size = recipe.rollout.size or 64
    image = torch.full((1, 3, size, size), 0.5, device=world.device, requires_grad=True)
    scores: Any = world.reward(image, [world.texts[0]])
    if not isinstance(scores, Tensor) or scores.shape != (1,):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RecipeError(
            f"reward {recipe.reward!r} gave {found} for one image: it takes Float[batch 3 h w] and a list of as many "
            "prompts, and returns the scores, Float[batch]."
        )
    reached = torch.autograd.grad(scores.sum(), image, allow_unused=True)[0] if scores.requires_grad else None
    if reached is None:
        raise RecipeError(DETACHED)
