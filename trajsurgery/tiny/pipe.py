"""The shipped pipelines: stock diffusers classes with the world's defaults."""

from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch

from trajsurgery.tiny.scene import SIDE

PipelineName = Literal["flux", "sd3", "wan"]
_ALL = Path(__file__).parent / "weights"
FOLDERS: dict[str, Path] = {"flux": _ALL / "pipeline", "sd3": _ALL / "sd3", "wan": _ALL / "wan"}
WEIGHTS = FOLDERS["flux"]

LATENT_CHANNELS = 4
LATENT_SIDE = SIDE // 4  # 8; Flux packs 2 x 2 latents into a token
TOKENS = (LATENT_SIDE // 2) ** 2
TEXT_WIDTH = 64
TEXT_LENGTH = 12  # tokens; the longest prompt has eight words, and CLIP adds two marks


def limit_prompt_length(pipe: Any) -> Any:
    """Return the pipeline, without progress bars, with prompts of at most as many tokens as its T5 tokenizer allows.

    Only two attributes of the instance are set; its class and its `__call__` are diffusers' own.
    """
    names = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if hasattr(pipe, name)]
    longest, get_embeds = getattr(pipe, names[0]).model_max_length, type(pipe)._get_t5_prompt_embeds

    def embeds(self: Any, *args: Any, max_sequence_length: int = longest, **options: Any) -> Any:
        return get_embeds(self, *args, max_sequence_length=min(max_sequence_length, longest), **options)

    pipe._get_t5_prompt_embeds = MethodType(embeds, pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(folder: Path = WEIGHTS) -> Any:
    """Load the pipeline of a folder in float32: the Flux of the embedded world, or the Wan of the videos.

    Prompts are as long as the world's (see `limit_prompt_length`), images 32 x 32 pixels by default. After a plain
    `from_pretrained(folder)` pass `height=32, width=32, max_sequence_length=12`. A Wan always needs its size:
    `height=32, width=32, num_frames=5`.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = LATENT_SIDE
    return limit_prompt_length(pipe)
