"""What the preview needs to know of each embedded model: prompts, reward, rules, latents, call arguments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajsurgery.tiny.pipe import PipelineName


@dataclass(frozen=True, eq=False)
class PreviewModel:
    """One embedded model with its world."""

    name: str
    """For titles."""
    pipe: Any
    reward: Callable[..., Any]
    """(images or videos, prompts) -> scores."""
    judge: Callable[..., Any]
    """(images or videos, prompts) -> a verdict with `correct`."""
    heldout: Sequence[Any]
    """Prompts with a text and a category."""
    understand: Callable[..., list[Any]]
    """Parses texts; ValueError on one that the world does not know."""
    noise: tuple[int, ...]
    """Shape of the latents of one picture, as the pipeline's `latents` argument."""
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of the pipeline."""
    columns: int = 4
    """Default number of noises; videos are wide."""

    def evenly(self, each: int) -> list[Any]:
        """Return up to `each` held-out prompts of every category, spread over its list."""
        groups: dict[str, list[Any]] = {}
        for prompt in self.heldout:
            groups.setdefault(prompt.category, []).append(prompt)
        least = min(each, *map(len, groups.values()))
        return [group[i * len(group) // least] for group in groups.values() for i in range(least)]


def preview_model(name: PipelineName) -> PreviewModel:
    """Return the shipped model of this name."""
    from trajsurgery import tiny

    pipe = tiny.pipeline(name)
    return video_model(pipe) if name == "wan" else image_model(name, pipe)


def image_model(name: PipelineName, pipe: Any) -> PreviewModel:
    """Return a Flux or an SD3 in the world of shapes."""
    from trajsurgery.tiny.pipe import LATENT_CHANNELS, LATENT_SIDE, TOKENS
    from trajsurgery.tiny.prompt import split_prompts, understand
    from trajsurgery.tiny.rules import judge
    from trajsurgery.tiny.scorer import Reward
    from trajsurgery.tiny.sd3 import GUIDANCE

    world = Reward(), judge, split_prompts("heldout"), understand
    if name == "flux":
        return PreviewModel("The embedded Flux", pipe, *world, (TOKENS, 4 * LATENT_CHANNELS))
    latents = (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    return PreviewModel("The embedded SD3", pipe, *world, latents, {"guidance_scale": GUIDANCE})


def video_model(pipe: Any) -> PreviewModel:
    """Return a Wan in the world of moving shapes."""
    from trajsurgery.tiny.scene import SIDE
    from trajsurgery.tiny.video import FRAMES, GUIDANCE, LATENT, motions, understand
    from trajsurgery.tiny.video_reward import MotionReward
    from trajsurgery.tiny.video_rules import judge

    size = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "guidance_scale": GUIDANCE}
    return PreviewModel(
        "The embedded Wan", pipe, MotionReward(), judge, motions("heldout"), understand, LATENT, size, 2
    )
