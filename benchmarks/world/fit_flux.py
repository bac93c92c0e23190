"""Stage three: train the transformer by flow matching on cached latents; the text encoders stay frozen.

What a prompt says about places matters only where a picture is nearly noise, so such times are drawn more often. An
auxiliary linear head, discarded after training, predicts what each quadrant holds from the image tokens half-way
through the transformer.
"""

from collections.abc import Generator as Yields
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from benchmarks.world.compose import compose
from benchmarks.world.fit_text import Encoders
from benchmarks.world.flux_parts import image_ids, pack
from benchmarks.world.hard_negatives import mistakes
from benchmarks.world.layout import KINDS, contents
from benchmarks.world.render import render
from benchmarks.world.stage import Budget, Stage
from trajsurgery.tiny.pipe import LATENT_CHANNELS, TEXT_LENGTH, TOKENS
from trajsurgery.tiny.prompt import draw_prompts, meanings, split_prompts

# Pictures of two objects are the hard ones.
WEIGHTS = {
    "single object": 0.08,
    "two objects": 0.14,
    "counting": 0.2,
    "colours": 0.1,
    "position": 0.26,
    "attribute binding": 0.22,
}
# The share of scenes whose caption is a mistake, once there are mistakes: the head-room for post-training.
MISTAKEN = {"position": 0.5, "attribute binding": 0.4}
MISTAKES_FROM = 0.6  # share of the steps after which there are mistakes: bindings are learnt first, then blurred
DRAWS = 2  # noises for each picture
EARLY, EARLY_FROM = 0.3, 0.75  # share of the times that are uniform above this sigma; the others are logit-normal
LESSON = 0.1  # weight of the cross-entropy of what the head reads


@dataclass(frozen=True)
class Corpus:
    """Scenes as latents. tokens: Float[scenes 16 16], normalised and packed; right, wrong: Int[scenes], captions.

    The captions index `split_prompts("train")`; `wrong` is a mistake or, for most scenes, the right one. shown:
    Int[scenes 4], the kind of object in each quadrant, or KINDS for none.
    """

    tokens: Tensor
    right: Tensor
    wrong: Tensor
    shown: Tensor


def corpus(
    vae: Any,
    scenes: int,
    seed: int,
    weights: Mapping[str, float] = WEIGHTS,
    mistaken: Mapping[str, float] = MISTAKEN,
    scaled: bool = False,
) -> Corpus:
    """Draw, render and encode scenes of the training prompts.

    Sets the VAE's shift and scale by them, unless it is `scaled` already.
    """
    generator = Generator().manual_seed(seed)
    prompts = split_prompts("train")
    index = {prompt.text: i for i, prompt in enumerate(prompts)}
    drawn = draw_prompts("train", scenes, weights, generator)
    meaning, latents, shown = meanings(drawn), [], []
    with torch.no_grad():
        for start in range(0, scenes, 256):
            composed = compose(meaning[slice(start, start + 256)], generator)
            images = render(composed)
            shown.append(contents(composed).argmax(-1))
            latents.append(vae.encode(2 * images - 1).latent_dist.mode())
    stacked = torch.cat(latents)
    if not scaled:
        vae.register_to_config(shift_factor=float(stacked.mean()), scaling_factor=1 / float(stacked.std()))
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    wrong: list[int] = []
    for prompt, chance, which in zip(
        drawn, torch.rand(scenes, generator=generator), torch.rand(scenes, generator=generator)
    ):
        others = [index[p.text] for p in mistakes(prompt) if p.text in index]
        swapped = bool(others) and float(chance) < mistaken.get(prompt.category, 0)
        wrong.append(others[int(float(which) * len(others))] if swapped else index[prompt.text])
    right = torch.tensor([index[prompt.text] for prompt in drawn])
    return Corpus(pack((stacked - shift) * scale), right, torch.tensor(wrong), torch.cat(shown))


def predict(transformer: Any, noisy: Tensor, sigma: Tensor, pooled: Tensor, states: Tensor) -> Tensor:
    """Return one velocity, Float[batch 16 16], called as FluxPipeline calls the transformer."""
    return transformer(
        hidden_states=noisy,
        timestep=sigma,
        guidance=None,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        img_ids=image_ids(),
        return_dict=False,
    )[0]


def sample(transformer: Any, vae: Any, pooled: Tensor, states: Tensor, steps: int, generator: Generator) -> Tensor:
    """Sample images in [0, 1] by Euler steps at evenly falling sigmas, as the pipeline does, without its packing."""
    x = torch.randn(pooled.shape[0], TOKENS, 4 * LATENT_CHANNELS, generator=generator)
    for step in range(steps):
        sigma = torch.full((x.shape[0],), 1 - step / steps)
        x = x - predict(transformer, x, sigma, pooled, states) / steps
    return (vae.decode(unpack(x) / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5).clamp(0, 1)


def unpack(tokens: Tensor) -> Tensor:
    """Invert `pack`: Float[batch 16 16] tokens to Float[batch 4 8 8] latents."""
    side = round(TOKENS**0.5)
    blocks = tokens.view(-1, side, side, LATENT_CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(-1, LATENT_CHANNELS, 2 * side, 2 * side)


@contextmanager
def record_states(block: nn.Module) -> Yields[list[Tensor]]:
    """Record, within the `with` block, the image tokens' states after this part of a Flux.

    Yields a list with one Float[batch 16 width] a call.
    """
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        states.append(outputs[1])

    hook = block.register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()


def quadrants(tokens: Tensor) -> Tensor:
    """Return the mean state of each quadrant's image tokens, Float[batch 16 width] to Float[batch 4 width]."""
    half = round(TOKENS**0.5) // 2
    return tokens.view(len(tokens), 2, half, 2, half, -1).mean((2, 4)).flatten(1, 2)


def draw_sigmas(batch: int, generator: Generator) -> Tensor:
    """Draw Float[batch] sigmas: logit-normal or, for the share EARLY, uniform above EARLY_FROM."""
    usual = torch.randn(batch, generator=generator).sigmoid()
    early = EARLY_FROM + (1 - EARLY_FROM) * torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < EARLY, early, usual)


def flux_stage(budget: Budget, batch: int, transformer: Any, encoders: Encoders, vae: Any, data: Corpus) -> Stage:
    """Return the stage: x = (1 - sigma) x_0 + sigma noise, error against noise - x_0, and the head's loss."""
    with torch.no_grad():
        embeddings = encoders.encode(*encoders.tokens([prompt.text for prompt in split_prompts("train")]))
    torch.manual_seed(budget.seed + 6)
    layout_head = nn.Linear(transformer.inner_dim, KINDS + 1)

    def loss(step: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(data.right), (batch // DRAWS,), generator=generator)
        captions = (data.wrong if step >= MISTAKES_FROM * budget.steps else data.right)[rows]
        pooled, states = (part[captions].repeat_interleave(DRAWS, 0) for part in embeddings)
        clean, shown = (part[rows].repeat_interleave(DRAWS, 0) for part in (data.tokens, data.shown))
        noise, sigma = torch.randn(clean.shape, generator=generator), draw_sigmas(len(clean), generator)
        noisy = clean + sigma[:, None, None] * (noise - clean)
        with record_states(transformer.transformer_blocks[-1]) as hidden:
            flow_loss = functional.mse_loss(predict(transformer, noisy, sigma, pooled, states), noise - clean)
        predicted_contents = layout_head(quadrants(hidden[0]))
        return flow_loss + LESSON * functional.cross_entropy(predicted_contents.flatten(0, 1), shown.flatten())

    def report() -> str:
        from trajsurgery.tiny.rules import judge

        prompts = [p for p in split_prompts("validation") for _ in range(4 if p.category != "position" else 2)]
        pooled, states = encoders.encode(*encoders.tokens([prompt.text for prompt in prompts]))
        verdict = judge(sample(transformer, vae, pooled, states, 25, Generator().manual_seed(3)), prompts)
        table = " ".join(f"{category} {share:.2f}" for category, (share, _) in verdict.table().items())
        return f"right: {table}, junk {float(verdict.junk.mean()):.4f}"

    modules = nn.ModuleDict({"transformer": transformer, "head": layout_head})
    return Stage("flux", modules, loss, budget, report)
