"""Stage one: train the autoencoder on freshly drawn scenes."""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.world.compose import compose
from benchmarks.world.flux_parts import vae
from benchmarks.world.render import render
from benchmarks.world.stage import Budget, Stage
from trajsurgery.tiny.prompt import CATEGORIES, draw_prompts, meanings
from trajsurgery.tiny.rules import judge

EVENLY: dict[str, float] = dict.fromkeys(CATEGORIES, 1.0)
DIVERGENCE = 1e-3  # weight of the mean KL divergence of a latent


def reconstructions(model: Any, images: Tensor) -> Tensor:
    """Encode and decode images in [0, 1], with the mean latent."""
    return (model.decode(model.encode(2 * images - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)


def vae_stage(budget: Budget, batch: int) -> Stage:
    """Return the AutoencoderKL's stage: absolute and squared error of the pixels, and DIVERGENCE times the KL."""
    torch.manual_seed(budget.seed)
    model = vae()

    def loss(step: int, generator: Generator) -> Tensor:
        prompts = draw_prompts("train", batch, EVENLY, generator)
        images = 2 * render(compose(meanings(prompts), generator)) - 1
        latents = model.encode(images).latent_dist
        drawn = latents.mean + latents.std * torch.randn(latents.mean.shape, generator=generator)
        error = model.decode(drawn).sample - images
        divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
        return error.abs().mean() + error.square().mean() + DIVERGENCE * divergence

    def report() -> str:
        generator = Generator().manual_seed(1)
        prompts = draw_prompts("validation", 240, EVENLY, generator)
        verdict = judge(reconstructions(model, render(compose(meanings(prompts), generator))), prompts)
        return f"reconstructions right {verdict.table()['overall'][0]:.3f}, junk {float(verdict.junk.mean()):.4f}"

    return Stage("vae", nn.ModuleDict({"vae": model}), loss, budget, report, report_every=200)
