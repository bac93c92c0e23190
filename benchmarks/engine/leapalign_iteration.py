"""One LeapAlign iteration through `operate`, written by hand, and as bare transformer calls; for overhead.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from trajsurgery import leapalign, operate
from trajsurgery.surgery.velocity_calls import Memory
from trajsurgery.training import objective

LAMBDA, TAU, ALPHA = 10.0, 0.05, 0.3


@dataclass(frozen=True)
class Options:
    """Size and length of the measurement."""

    pairs: int = 12
    """Pairs of iterations, their order alternating."""
    steps: int = 25
    """T."""
    batch: int = 2
    k: int = 17
    j: int = 8
    threads: int = 1
    output: Path = Path(__file__).parent / "results"


def pipeline() -> Any:
    """Return a FluxPipeline large enough that its model calls dominate; prompt embeddings are passed in."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class IterationBench:
    """The pipeline, its inputs, and three ways to run an iteration on them."""

    def __init__(self, options: Options) -> None:
        self.options, self.pipe, self.side = options, pipeline(), 64
        generator = torch.Generator().manual_seed(1)
        self.prompts = torch.randn(options.batch, 16, 128, generator=generator)
        self.pooled = torch.randn(options.batch, 128, generator=generator)
        self.reward_weights = torch.randn(3, self.side, self.side, generator=generator)
        self.module = self.pipe.transformer
        self.plan = leapalign(options.k, options.j, ALPHA)

    def noise(self) -> torch.Generator:
        """Return the same noise generator every time."""
        return torch.Generator().manual_seed(2)

    def reward(self, images: Tensor) -> Tensor:
        """Return some differentiable scores, [batch]."""
        return (images * self.reward_weights).mean((1, 2, 3))

    def through_operate(self, memory: Memory, before_backward: Callable[[], object] = lambda: None) -> Tensor:
        """Run the iteration through `operate`, as trajsurgery.training.training_loop does.

        Args:
            before_backward: called between the decode's backward pass and the transformer's.
        """
        with operate(self.pipe, self.plan, memory) as surgery:
            images = self.pipe(
                prompt_embeds=self.prompts,
                pooled_prompt_embeds=self.pooled,
                num_inference_steps=self.options.steps,
                height=self.side,
                width=self.side,
                generator=self.noise(),
                output_type="pt",
            ).images
        weights = objective.weights(self.plan, surgery.trajectory, surgery.distances, "all", TAU)
        loss = objective.loss([self.reward(images)], weights.w, LAMBDA)
        cotangents, images = objective.cotangents(loss, surgery.outputs), images.detach()
        before_backward()
        torch.autograd.backward(surgery.outputs, cotangents)
        return images

    def by_hand(self) -> Tensor:
        """Run the iteration as hand-written trainers do: the pipeline's loop copied, Algorithm 1 inside it."""
        x, call, timesteps = self.prepare()
        k, j, steps = self.options.k, self.options.j, self.options.steps
        sigma, to_j, to_0, d_j = self.pipe.scheduler.sigmas, x, x, x
        for i, timestep in enumerate(timesteps):
            t = steps - i
            if t == j:
                d_j = (x - to_j.detach()).abs().flatten(1).mean(1)
                x_j = to_j + (x - to_j).detach()
                v = call(ALPHA * x_j + (1 - ALPHA) * x_j.detach(), timestep)
                to_0 = x_j - sigma[i] * v
            elif t == k:
                v = call(x, timestep)
                to_j = x - (sigma[i] - sigma[steps - j]) * v
            else:
                with torch.no_grad():
                    v = call(x, timestep)
            with torch.no_grad():
                x = self.pipe.scheduler.step(v.detach(), timestep, x, return_dict=False)[0]
        d_0 = (x - to_0.detach()).abs().flatten(1).mean(1)
        images = self.decode(to_0 + (x - to_0).detach())
        w = 1 / (d_j.clamp(min=TAU) + d_0.clamp(min=TAU))
        (w * (LAMBDA - self.reward(images)).clamp(min=0)).mean().backward()
        return images.detach()

    def prepare(self) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Return x_T, the model call and the timesteps, as FluxPipeline prepares them."""
        pipe, batch, steps = self.pipe, self.options.batch, self.options.steps
        _, _, text_ids = pipe.encode_prompt(None, None, prompt_embeds=self.prompts, pooled_prompt_embeds=self.pooled)
        x, image_ids = pipe.prepare_latents(batch, 4, self.side, self.side, torch.float32, "cpu", self.noise(), None)
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
        config = pipe.scheduler.config
        shift = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        timesteps, _ = retrieve_timesteps(
            pipe.scheduler, steps, "cpu", sigmas=sigmas, mu=calculate_shift(x.shape[1], *shift)
        )
        pipe.scheduler.set_begin_index(0)
        guidance = torch.full([1], 3.5).expand(batch)

        def call(x: Tensor, timestep: Tensor) -> Tensor:
            return self.module(
                hidden_states=x,
                timestep=timestep.expand(batch) / 1000,
                guidance=guidance,
                pooled_projections=self.pooled,
                encoder_hidden_states=self.prompts,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]

        return x, call, timesteps

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents to images, as FluxPipeline does."""
        config = self.pipe.vae.config
        x = self.pipe._unpack_latents(x, self.side, self.side, self.pipe.vae_scale_factor)
        images = self.pipe.vae.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(images, output_type="pt")

    def bare_calls(self, forwards: int) -> None:
        """Call the transformer `forwards` times without gradient, then twice forward and backward, without a loop."""
        x, call, timesteps = self.prepare()
        with torch.no_grad():
            for i in range(forwards):
                call(x, timesteps[i % len(timesteps)])
        for i in (0, 1):
            call(x.requires_grad_(i == 1), timesteps[i]).sum().backward()

    def iterations(self) -> dict[str, Callable[[], Tensor]]:
        """Return the ways to run an iteration, which do the same work."""
        return {
            "split": partial(self.through_operate, "split"),
            "retain": partial(self.through_operate, "retain"),
            "by hand": self.by_hand,
        }

    def zero(self) -> None:
        """Set the gradients to zero without freeing them."""
        self.module.zero_grad(set_to_none=False)
        gc.collect()

    def clear(self) -> None:
        """Free the gradients and collect garbage."""
        self.module.zero_grad(set_to_none=True)
        gc.collect()
