"""What the preview needs to know of each embedded model: its prompts, its reward, its rules, its noise, its call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajsurgery.tiny.pipe import PipelineName


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One embedded model with its world."""

    name: str
    """As a title says it."""
    pipe: Any
    reward: Callable[..., Any]
    """(images or videos, prompts) -> scores."""
    judge: Callable[..., Any]
    """(images or videos, prompts) -> a verdict with `correct`."""
    heldout: Sequence[Any]
    """Prompts that have a text and a category."""
    understand: Callable[..., list[Any]]
    """Prompts of texts; ValueError on one that the world can't say."""
    noise: tuple[int, ...]
    """The shape of the latents of one picture, as the pipe's call takes them."""
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of the pipe's call."""
    columns: int = 4
    """Noises, if no other number is asked for: videos are wide."""

    def evenly(self, each: int) -> list[Any]:
        """Up to `each` held-out prompts of every category, as many of one as of another, far apart in its list."""
        groups: dict[str, list[Any]] = {}
        for prompt in self.heldout:
            groups.setdefault(prompt.category, []).append(prompt)
        least = min(each, *map(len, groups.values()))
        return [group[i * len(group) // least] for group in groups.values() for i in range(least)]


def exhibit(name: PipelineName) -> Exhibit:
    """The shipped model of this name."""
    from trajsurgery import tiny

    pipe = tiny.pipeline(name)
    return videos(pipe) if name == "wan" else pictures(name, pipe)


def pictures(name: PipelineName, pipe: Any) -> Exhibit:
    """A Flux or an SD3 in the world of shapes."""
    from trajsurgery.tiny.pipe import LATENT_CHANNELS, LATENT_SIDE, TOKENS
    from trajsurgery.tiny.prompt import split_prompts, understand
    from trajsurgery.tiny.rules import judge
    from trajsurgery.tiny.scorer import Reward
    from trajsurgery.tiny.sd3 import GUIDANCE

    world = Reward(), judge, split_prompts("heldout"), understand
    if name == "flux":
        return Exhibit("The embedded Flux", pipe, *world, (TOKENS, 4 * LATENT_CHANNELS))
    latents = (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    return Exhibit("The embedded SD3", pipe, *world, latents, {"guidance_scale": GUIDANCE})


def videos(pipe: Any) -> Exhibit:
    """A Wan in the world of moving shapes."""
    from trajsurgery.tiny.scene import SIDE
    from trajsurgery.tiny.video import FRAMES, GUIDANCE, LATENT, motions, understand
    from trajsurgery.tiny.video_reward import MotionReward
    from trajsurgery.tiny.video_rules import judge

    size = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "guidance_scale": GUIDANCE}
    return Exhibit("The embedded Wan", pipe, MotionReward(), judge, motions("heldout"), understand, LATENT, size, 2)
