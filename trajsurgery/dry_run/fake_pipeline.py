"""A pipeline of real size without weights or memory, built from configs under fake tensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from trajsurgery.errors import RecipeError
from trajsurgery.tiny.pipe import FOLDERS
from trajsurgery.training.settings import Rollout

CONFIGS = Path(__file__).parent / "configs"
TEXT_WIDTHS = ("joint_attention_dim", "text_dim", "cross_attention_dim", "caption_channels", "cap_feat_dim")
"""Names that transformers' configs use for the width of a prompt's encoding."""


@dataclass(frozen=True)
class PipelineSpec:
    """The configs of a pipeline's parts, as in a diffusers folder."""

    name: str
    source: str
    pipeline: str
    """Name of the diffusers class."""
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokens: int
    """Of an encoded prompt."""
    text_encoders: Mapping[str, int] = field(default_factory=dict[str, int])
    """Their parameters, if known."""
    published: int | None = None
    """The transformer's parameters, as published."""

    @property
    def text_width(self) -> int:
        """Width of each token of an encoded prompt.

        Raises:
            RecipeError: the transformer's config does not say.
        """
        width = next((int(self.transformer[name]) for name in TEXT_WIDTHS if name in self.transformer), None)
        if width is None:
            raise RecipeError(
                f"the config of {self.name} names no width of a prompt's encoding: {', '.join(TEXT_WIDTHS)}."
            )
        return width


def find_spec(model: str) -> PipelineSpec:
    """Return the configs of a hub id that ships with the package, of an embedded model, or of a local diffusers folder.

    Raises:
        RecipeError: it is none of them.
    """
    specs: dict[str, Any] = {}
    for path in sorted(CONFIGS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        specs |= dict.fromkeys(data.pop("models"), data)
    if model in specs:
        return PipelineSpec(name=model, **specs[model])
    world, _, rest = model.partition(":")
    names: Mapping[str, Path] = FOLDERS  # pyright: ignore[reportAssignmentType]
    folder = names.get(rest or "flux", Path(model)) if world == "tiny" else Path(model)
    if (folder / "model_index.json").is_file():
        return _of_folder(model, folder)
    raise RecipeError(
        f"no config of {model!r}: a dry run knows {', '.join(specs)}, the embedded models, and any folder that "
        "diffusers' save_pretrained wrote: pass --model FOLDER (its weights are not read)."
    )


def _of_folder(model: str, folder: Path) -> PipelineSpec:
    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    lengths = [
        int(read(f"{path.name}/tokenizer_config.json").get("model_max_length", 512))
        for path in sorted(folder.glob("tokenizer*"))
        if (path / "tokenizer_config.json").is_file()
    ]
    # The last tokenizer is the long one; pipelines with three join its tokens to those of the first.
    longest = min(lengths[-1], 512) if lengths else 512
    return PipelineSpec(
        name=model,
        source=f"the folder {folder.name}",
        pipeline=read("model_index.json")["_class_name"],
        transformer=read("transformer/config.json"),
        vae=read("vae/config.json"),
        scheduler=read("scheduler/scheduler_config.json"),
        tokens=longest + (lengths[0] if len(lengths) > 2 else 0),
    )


@dataclass(frozen=True, eq=False)
class FakePipeline:
    """A pipeline whose transformer and VAE are fake tensors, and the transformer's calls in one step of its loop."""

    pipe: Any
    mode: FakeTensorMode
    calls: tuple[dict[str, Any], ...]
    """Keyword arguments of one call, or of two with a classifier-free guidance that makes two calls."""

    @property
    def transformer(self) -> nn.Module:
        """The module that trains."""
        return self.pipe.transformer

    def velocity(self) -> list[Tensor]:
        """Make one step's calls; return the velocities that guidance joins."""
        return [self.transformer(**call)[0] for call in self.calls]

    def chained(self) -> list[Tensor]:
        """The same with a gradient to the latents, which a further call of a plan passes on."""
        calls = [{**call, "hidden_states": call["hidden_states"].clone().requires_grad_()} for call in self.calls]
        return [self.transformer(**call)[0] for call in calls]

    def count(self, part: str) -> int:
        """Return the parameters of a part."""
        return sum(p.numel() for p in getattr(self.pipe, part).parameters())


def build_pipeline(found: PipelineSpec, rollout: Rollout, batch: int, dtype: torch.dtype) -> FakePipeline:
    """Build the pipeline of a spec for a rollout of `batch` images."""
    mode = FakeTensorMode()
    library = import_module("diffusers")
    pipeline = getattr(library, found.pipeline)
    with mode:
        transformer = build_model(found.transformer, dtype)
        vae = build_model(found.vae, torch.float32)
    scheduler = getattr(library, found.scheduler["_class_name"]).from_config(dict(found.scheduler))
    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    arguments = inspect.signature(pipeline.__init__).parameters
    missing = [
        n for n, p in arguments.items() if n != "self" and n not in parts and p.default is inspect.Parameter.empty
    ]
    pipe = pipeline(**dict.fromkeys(missing), **parts)
    pipe.set_progress_bar_config(disable=True)
    captured = _first_step_calls(pipe, rollout, _prompt(found, pipe, batch, dtype))
    fake = [tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, call) for call in captured]
    return FakePipeline(pipe, mode, tuple(fake))


def build_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a frozen model from a config, with weights in the dtype."""
    library = import_module("diffusers")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # `to` fails on fake parameters
    try:
        model = getattr(library, config["_class_name"]).from_config(dict(config))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def _prompt(found: PipelineSpec, pipe: Any, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return encodings of the shapes that the pipeline's call takes, by argument name."""
    config = found.transformer
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (batch, found.tokens, found.text_width)}
    if "pooled_projection_dim" in config:
        shapes["pooled_prompt_embeds"] = (batch, int(config["pooled_projection_dim"]))
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    taken = inspect.signature(type(pipe).__call__).parameters
    encodings = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items() if name in taken}
    masks = [name for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask") if name in taken]
    return encodings | {name: torch.ones(batch, found.tokens, dtype=torch.long) for name in masks}


class _FirstStepReached(Exception):  # noqa: N818
    """The first step's calls are recorded."""


def _first_step_calls(pipe: Any, rollout: Rollout, prompt: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return what the pipeline's loop passes to its transformer in the first step; only latents are computed."""
    module, calls = pipe.transformer, list[dict[str, Any]]()
    names = list(inspect.signature(module.forward).parameters)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        calls.append({**dict(zip(names, args)), **kwargs, "return_dict": False})
        return (torch.zeros_like(calls[-1]["hidden_states"]),)

    def stop(*_: Any, **__: Any) -> None:
        raise _FirstStepReached

    size = {} if rollout.shape is None else dict(zip(("height", "width"), rollout.shape))
    frames = {} if rollout.frames is None else {"num_frames": rollout.frames}
    module.forward, pipe.scheduler.step = forward, stop
    try:
        pipe(**prompt, **size, **frames, num_inference_steps=rollout.steps, guidance_scale=rollout.guidance)
    except _FirstStepReached:
        pass
    finally:
        del module.forward, pipe.scheduler.step
    return calls


def latents(model: FakePipeline, rollout: Rollout, batch: int) -> Tensor:
    """Return fake latents for the VAE: [batch, channels, h, w], with frames before h for videos."""
    pipe, config = model.pipe, model.pipe.vae.config
    scale = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
    default = getattr(pipe, "default_sample_size", 64) * scale
    height, width = (side // scale for side in rollout.shape or (default, default))
    channels = config.get("latent_channels") or config.get("z_dim")
    frames: tuple[int, ...] = ()
    if "z_dim" in config:  # a video's VAE, also where it decodes images
        frames = (((rollout.frames or 1) - 1) // (2 ** sum(config.get("temperal_downsample", ()))) + 1,)
    with model.mode:
        return torch.empty((batch, channels, *frames, height, width))
