"""The shipped pipelines: stock diffusers classes, loaded from the package, whose defaults are those of the world."""

from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor

from trajsurgery.tiny.architecture import LATENT_SIDE
from trajsurgery.tiny.tokenizers import TEXT_LENGTH

PipelineName = Literal["flux", "sd3"]
FOLDERS: dict[PipelineName, Path] = {
    "flux": Path(__file__).parent / "weights" / "pipeline",
    "sd3": Path(__file__).parent / "weights" / "sd3",
}
WEIGHTS = FOLDERS["flux"]


def _short_t5_embeds(
    self: Any,
    prompt: str | list[str],
    num_images_per_prompt: int = 1,
    max_sequence_length: int = TEXT_LENGTH,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The pipeline's own T5 embedding, at most TEXT_LENGTH tokens long: its default is mostly padding here."""
    short = min(max_sequence_length, TEXT_LENGTH)
    return type(self)._get_t5_prompt_embeds(self, prompt, num_images_per_prompt, short, device, dtype)


def pipeline(folder: Path = WEIGHTS) -> Any:
    """The FluxPipeline or StableDiffusion3Pipeline of the folder, float32, that draws the embedded world.

    Its class is diffusers' own. Two defaults are set on the instance: images of 32 x 32 pixels and prompts of
    TEXT_LENGTH tokens. After a plain `from_pretrained(folder)` say `height=32, width=32, max_sequence_length=12`.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.default_sample_size = LATENT_SIDE
    pipe._get_t5_prompt_embeds = MethodType(_short_t5_embeds, pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe
