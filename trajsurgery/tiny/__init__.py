"""The embedded world: coloured shapes, tiny pipelines trained on them, a reward, and rules to check it by.

    pipe = tiny.pipeline()                      # a real FluxPipeline, float32, 32 x 32 pixels
    reward = tiny.Reward()                      # (images in [0, 1], prompts) -> cosines, differentiable
    prompts = tiny.prompts("heldout")           # every held-out prompt
    verdict = tiny.judge(images, prompts)       # .correct, .junk, .table()

pipe.py, sd3.py                       the shipped pipelines: Flux, Wan, SD3
scorer.py                             the reward, a small open_clip CLIP
scene.py, prompt.py, outlines.py      scenes, prompts, the shapes' outlines
segment.py, rules.py                  pixels to scenes; whether a prompt is true of a scene, the rule-based judge
video.py, video_rules.py, video_reward.py   the video world
weights/                              trained weights, how they were made and what they reach

It imports nothing of this library but `errors`; diffusers, transformers and open_clip are imported when used. What made
the weights and what previews them is in benchmarks/world.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Generator

from trajsurgery.tiny.pipe import FOLDERS, PipelineName
from trajsurgery.tiny.pipe import pipeline as _load_folder
from trajsurgery.tiny.prompt import CATEGORIES, EVEN_RATIO, RATIO, Prompt, Split, draw_prompts, split_prompts
from trajsurgery.tiny.rules import Verdict, judge
from trajsurgery.tiny.scorer import Reward

__all__ = ["EVEN_RATIO", "Prompt", "Reward", "Verdict", "judge", "pipeline", "prompts"]


def pipeline(name: PipelineName = "flux") -> Any:
    """Load a shipped pipeline in float32, with the world's defaults: `pipe("a red circle left of a blue square")`.

    "flux" is a FluxPipeline without guidance; "sd3" a StableDiffusion3Pipeline with real classifier-free guidance, to
    be called with `guidance_scale=1.5`; "wan" a WanPipeline of the video world, to be called with its size, `pipe("a
    red circle moves right", height=32, width=32, num_frames=5, guidance_scale=2)`.

    Raises ValueError for another name.
    """
    if name not in FOLDERS:
        raise ValueError(f"there is no pipeline {name!r}: choose one of {', '.join(FOLDERS)}")
    if name == "sd3":
        from trajsurgery.tiny import sd3

        return sd3.pipeline()
    return _load_folder(FOLDERS[name])


def prompts(
    split: Split,
    generator: Generator | None = None,
    count: int | None = None,
    ratio: Mapping[str, float] | None = None,
) -> list[Prompt]:
    """Return prompts of the split "train", "validation" or "heldout".

    With neither generator nor count, all of them, grouped by category. With both, `count` drawn at random: of "train"
    in the paper's ratio of categories (7:5:3:1:1:0 for position, counting, attribute binding, colours, two objects,
    single object) or in the given one, {category: weight}; of the others all six categories equally often.

    Raises ValueError for another split, or if only one of generator and count is given.
    """
    if (generator is None) != (count is None):
        raise ValueError(
            "prompts() draws `count` prompts with a `generator`: give both, or neither for all of the split"
        )
    if generator is None or count is None:
        return list(split_prompts(split))
    usual: Mapping[str, float] = RATIO if split == "train" else dict.fromkeys(CATEGORIES, 1.0)
    return draw_prompts(split, count, usual if ratio is None else ratio, generator)
