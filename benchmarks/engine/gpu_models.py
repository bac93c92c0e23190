"""FLUX.1-dev and SD3.5-Medium at real size with random weights, and the ways to run one iteration on them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trajsurgery
from trajsurgery import backward, leapalign, operate

ALPHA = 0.3
SMALL = {
    "flux_1_dev": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
    "sd3_5_medium": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "dual_attention_layers": (0,),
        "sample_size": 16,
        "pos_embed_max_size": 24,
    },
}
SMALL_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}


@dataclass(frozen=True)
class Scale:
    """The machine's scale: real size on a GPU, or tiny models on the CPU to try the script out."""

    small: bool

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cpu" if self.small else "cuda"

    @property
    def steps(self) -> tuple[int, int, int]:
        """T, k and j."""
        return (5, 4, 2) if self.small else (25, 17, 8)


def build(config: dict[str, Any], changes: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Return a model of diffusers, made on the device: matrices normal(0.02), biases 0, scales of norms 1."""
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(diffusers, config["_class_name"]).from_config({**config, **changes})
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.to(dtype).eval()


def pipeline(name: str, scale: Scale, **parts: Any) -> Any:
    """Return the pipeline of one of the dry run's configs; text encoders and tokenizers are None unless given."""
    import diffusers

    spec = json.loads(next(Path(trajsurgery.__file__).parent.rglob(f"{name}.json")).read_text())
    changes = SMALL[name] if scale.small else {}
    scheduler: Any = getattr(diffusers, spec["scheduler"]["_class_name"])
    kind: Any = getattr(diffusers, spec["pipeline"])
    parts |= {
        "transformer": build(spec["transformer"], changes, scale.device, torch.bfloat16),
        "vae": build(spec["vae"], SMALL_VAE if scale.small else {}, scale.device, torch.float32),
        "scheduler": scheduler.from_config(spec["scheduler"]),
    }
    needed = [n for n, p in inspect.signature(kind.__init__).parameters.items() if p.default is inspect.Parameter.empty]
    pipe = kind(**{n: parts.get(n) for n in needed if n != "self"})
    pipe.vae.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Bench:
    """A pipeline with its inputs: one image, prompt embeddings passed in, latents as output, LeapAlign's plan."""

    def __init__(self, name: str, scale: Scale, checkpointing: bool = True) -> None:
        self.scale, self.pipe = scale, pipeline(name, scale)
        self.module: Any = self.pipe.transformer
        self.steps, k, j = scale.steps
        self.plan, self.times = leapalign(k, j, ALPHA), (k, j)
        if checkpointing:
            self.module.enable_gradient_checkpointing()
        flux, config = name == "flux_1_dev", self.module.config
        side = 64 if scale.small else 720 if flux else 512
        tokens = 16 if scale.small else 512 if flux else 333
        shapes = {
            "prompt_embeds": (1, tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        if not flux:
            shapes |= {f"negative_{key}": shape for key, shape in shapes.items()}
        self.call: dict[str, Any] = {
            key: self.normal(shape, number) for number, (key, shape) in enumerate(shapes.items())
        } | {
            "height": side,
            "width": side,
            "num_inference_steps": self.steps,
            "guidance_scale": 3.5 if flux else 4.5,
            "output_type": "latent",
        }
        self._record_calls()

    def normal(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return random numbers in bfloat16, the same on every machine."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.scale.device, torch.bfloat16)

    def _record_calls(self) -> None:
        """Record what a plain call of the pipeline passes to its transformer: `by_hand` makes the same calls."""
        self.calls: list[dict[str, Any]] = []
        hook = self.module.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(dict(kwargs)), with_kwargs=True
        )
        images = self.plain()
        hook.remove()
        self.noise, taste = self.calls[0]["hidden_states"][: len(images)], self.normal(tuple(images.shape), 9)
        self.cotangent: Callable[[Tensor], Tensor] = lambda x: taste
        """d(loss)/d(x_0), given x_0."""
        for call in self.calls:
            del call["hidden_states"]

    def sample(self) -> Tensor:
        """Call the pipeline."""
        return self.pipe(**self.call, generator=torch.Generator().manual_seed(2))[0]

    def plain(self) -> Tensor:
        """Return x_0 of the plain pipeline in the loop's own layout (Flux packs it), without gradient."""
        with torch.no_grad():
            return self.sample()

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """Return the guided velocity of one step, as the pipeline's loop makes it."""
        passes = 1 if "negative_prompt_embeds" not in self.call else 2
        v = self.module(hidden_states=torch.cat([x] * passes) if passes > 1 else x, **self.calls[step])[0]
        if passes == 1:
            return v
        unconditional, conditional = v.chunk(2)
        return unconditional + self.call["guidance_scale"] * (conditional - unconditional)

    def by_hand(self) -> Tensor:
        """Algorithm 1 of LeapAlign written into the sampling loop. Zeros that carry the gradient keep values exact."""
        scheduler, (k, j), x = self.pipe.scheduler, self.times, self.noise
        scheduler._step_index = None
        scheduler.set_begin_index(0)
        sigma, to_j, to_0 = scheduler.sigmas.to(x.device), x, x
        for step, timestep in enumerate(scheduler.timesteps):
            t = self.steps - step
            with torch.set_grad_enabled(t in self.times):
                if t == j:
                    v = self.velocity(x + ALPHA * (to_j - to_j.detach()), step)
                    to_0 = to_j - sigma[step] * v
                else:
                    v = self.velocity(x, step)
                    to_j = x - (sigma[step] - sigma[self.steps - j]) * v if t == k else to_j
            with torch.no_grad():
                x = scheduler.step(v.detach(), timestep, x, return_dict=False)[0]
        (x + (to_0 - to_0.detach())).backward(self.cotangent(x))
        return x

    def operated(self, memory: str) -> Tensor:
        """An iteration through `operate` that keeps the rollout's own calls."""
        options: Any = {"memory": memory}
        with operate(self.pipe, self.plan, **options) as surgery:
            x = self.sample()
        surgery.outputs[0].backward(self.cotangent(surgery.outputs[0].detach()))
        return x.detach()

    def staged(self, plan: Any = None) -> Tensor:
        """An iteration through `operate` without a plan, then the staged sweep."""
        with operate(self.pipe) as surgery:
            x = self.sample()
        backward(plan or self.plan, surgery.trajectory, surgery.field, self.cotangent(x))
        return x

    def ways(self, *without: str) -> dict[str, Callable[[], Tensor]]:
        """The ways to run an iteration. "split" raises where this version of the library has none."""
        ways: dict[str, Callable[[], Tensor]] = {
            "by hand": self.by_hand,
            "retain": lambda: self.operated("retain"),
            "staged": self.staged,
            "split": lambda: self.operated("split"),
            "recompute": lambda: self.operated("recompute"),
        }
        return {name: run for name, run in ways.items() if name not in without}

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def clear(self) -> None:
        """Drop all gradients."""
        self.module.zero_grad(set_to_none=True)
