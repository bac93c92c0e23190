"""Stage two: train the text encoders alone to encode what the training prompts mean.

An auxiliary linear head on T5's tokens, and one on CLIP's pooled state, predict how likely each quadrant is to hold
each kind of object, or none. A third one predicts from each noun's own token what the thing is and where it may be, so
that an image token's attention can find it there. The later stages freeze the encoders: trained with the transformer,
they forgot the relations (R^2 of a linear probe on held-out prompts fell from 0.87 to 0.01).
"""

from collections.abc import Generator as Yields
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from benchmarks.world.layout import KINDS, divergence, kl_divergence, layouts, nouns, places
from benchmarks.world.stage import Budget, Stage
from trajsurgery.tiny.pipe import TEXT_LENGTH
from trajsurgery.tiny.prompt import Split, split_prompts

BLUR = 0.5  # relative noise on the word embeddings: without it the encoders learn the few hundred prompts by heart


@dataclass(frozen=True)
class Encoders:
    """The two text encoders and their tokenizers."""

    clip: Any
    t5: Any
    clip_tokenizer: Any
    t5_tokenizer: Any

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return Int[batch TEXT_LENGTH] for CLIP and for T5, padded as FluxPipeline pads."""
        options: dict[str, Any] = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
        both = [t(texts, return_tensors="pt", **options).input_ids for t in (self.clip_tokenizer, self.t5_tokenizer)]
        return both[0], both[1]

    def encode(self, clip_tokens: Tensor, t5_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return CLIP's pooled state, Float[batch width], and T5's states, Float[batch TEXT_LENGTH width]."""
        return self.clip(clip_tokens).pooler_output, self.t5(t5_tokens)[0]


@contextmanager
def blurred_embeddings(tables: Sequence[nn.Module], generator: Generator) -> Yields[None]:
    """Multiply, within the `with` block, the outputs of these embedding tables by 1 + BLUR times noise."""

    def blur(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        return embedded * (1 + BLUR * torch.randn(embedded.shape, generator=generator))

    hooks = [table.register_forward_hook(blur) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Lesson:
    """A split's prompts and their meaning. tokens: for CLIP and T5. layouts: as `layout.layouts` returns them.

    rows, words: Int[nouns], the prompt and the token of every noun; nouns: Float[nouns KINDS+4], kind and place.
    """

    tokens: tuple[Tensor, Tensor]
    layouts: Tensor
    rows: Tensor
    words: Tensor
    nouns: Tensor


def _lesson(split: Split, encoders: Encoders) -> Lesson:
    prompts = split_prompts(split)
    texts = [prompt.text for prompt in prompts]
    words = nouns(texts)  # T5's tokens are the words
    rows, slots = (words >= 0).nonzero(as_tuple=True)
    noun_targets = places(prompts, Generator().manual_seed(9))[rows, slots]
    prompt_layouts = layouts(prompts, Generator().manual_seed(7))
    return Lesson(encoders.tokens(texts), prompt_layouts, rows, words[rows, slots], noun_targets)


def text_stage(budget: Budget, encoders: Encoders) -> Stage:
    """Return the stage that trains both encoders and their heads on the layouts and nouns of all training prompts."""
    torch.manual_seed(budget.seed + 1)
    width = encoders.t5.config.d_model
    sizes = {"clip": 4 * (KINDS + 1), "t5": 4 * (KINDS + 1), "nouns": KINDS + 4}
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
    lessons = {split: _lesson(split, encoders) for split in ("train", "validation")}
    tables = [encoder.get_input_embeddings() for encoder in (encoders.clip, encoders.t5)]

    def divergences(split: Literal["train", "validation"]) -> tuple[Tensor, Tensor]:
        """Return the divergences of both encoders' layouts, and of the nouns' kinds and places."""
        lesson = lessons[split]
        pooled, states = encoders.encode(*lesson.tokens)
        guesses = (heads["clip"](pooled), heads["t5"](states).mean(1))
        whole = sum((divergence(guess, lesson.layouts) for guess in guesses), torch.zeros(()))
        predicted = heads["nouns"](states[lesson.rows, lesson.words])
        kind, place = (
            kl_divergence(predicted[:, part], lesson.nouns[:, part]) for part in (slice(KINDS), slice(KINDS, None))
        )
        return whole.mean(), (kind + place).mean()

    def loss(step: int, generator: Generator) -> Tensor:
        with blurred_embeddings(tables, generator):
            return sum(divergences("train"), torch.zeros(()))

    def report() -> str:
        layout, noun = divergences("validation")
        return f"divergence of validation prompts from their layouts {float(layout):.3f}, nouns {float(noun):.3f}"

    modules = nn.ModuleDict({"clip": encoders.clip, "t5": encoders.t5, "heads": heads})
    return Stage("text", modules, loss, budget, report, report_every=100)
