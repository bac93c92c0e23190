"""`python -m trajsurgery.tiny.preview`: a contact sheet of what the tiny Flux draws, untuned and, with --run, tuned.

A row is a held-out prompt, a column a noise, the same for all prompts and for both models. Each picture carries the
rules' verdict and its reward.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from trajsurgery.errors import RecipeError
from trajsurgery.tiny.architecture import LATENT_CHANNELS, TOKENS
from trajsurgery.tiny.figures import evenly
from trajsurgery.tiny.prompt import CATEGORIES, Prompt, split_prompts, understand

RIGHT, WRONG = "#2e7d32", "#b3442e"


@dataclass(frozen=True)
class Preview:
    """What to draw, and where to."""

    run: Path | None = None
    """The output folder of a finished run on the embedded Flux, such as outputs/leapalign_flux; else the base alone."""
    prompts: tuple[str, ...] = ()
    """Prompts of the embedded world; `each` held-out ones of every category if left out."""
    each: int = 2
    """Held-out prompts of every category."""
    noises: int = 4
    """Pictures of each prompt."""
    steps: int = 25
    """The sampler's steps."""
    seed: int = 0
    """Of the noises."""
    output: Path | None = None
    """The picture's file: preview.png in the run's folder, or outputs/preview.png."""
    threads: int = 1

    def __post_init__(self) -> None:
        wrong = [name for name in ("each", "noises", "steps", "threads") if getattr(self, name) < 1]
        if wrong:
            raise RecipeError(f"{' and '.join(wrong)}: at least 1.")


@dataclass(frozen=True, eq=False)
class Sheet:
    """The pictures of one model, prompt by prompt, with what is said of them."""

    title: str
    images: Tensor
    """Float[prompts noises 3 h w]."""
    correct: Tensor
    """Bool[prompts noises]."""
    reward: Tensor
    """Float[prompts noises]."""

    @property
    def told(self) -> str:
        """The title with the means."""
        right, reward = float(self.correct.float().mean()), float(self.reward.mean())
        return f"{self.title}: {right:.0%} right, reward {reward:.3f}"


def tuned(run: Path) -> Any:
    """The transformer that a run left.

    Raises:
        RecipeError: the folder holds none, or one of another model.
    """
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    folder, recipe = run / "transformer", run / "recipe.json"
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} holds no tuned weights: let the run end first, or pass --run with another folder.")
    model = json.loads(recipe.read_text())["model"] if recipe.is_file() else "tiny"
    if model != "tiny":
        raise RecipeError(f"{run} holds a run of {model}: this draws the embedded Flux, whose recipes say model tiny.")
    return FluxTransformer2DModel.from_pretrained(folder)


def chosen(config: Preview) -> list[Prompt]:
    """The prompts asked for.

    Raises:
        RecipeError: the embedded world can't say one of them.
    """
    try:
        if config.prompts:
            return understand(config.prompts)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    least = min(sum(p.category == c for p in split_prompts("heldout")) for c in CATEGORIES)
    return evenly("heldout", min(config.each, least))


def sheet(title: str, pipe: Any, reward: Any, prompts: list[Prompt], config: Preview, advance: Any) -> Sheet:
    """Draws and judges all pictures of one model; calls `advance()` after each prompt."""
    from trajsurgery.tiny.rules import judge

    generator = Generator().manual_seed(config.seed)
    noise = torch.randn(config.noises, TOKENS, 4 * LATENT_CHANNELS, generator=generator)
    parts: list[Tensor] = []
    for prompt in prompts:
        options: dict[str, Any] = {"num_inference_steps": config.steps, "latents": noise, "output_type": "pt"}
        parts.append(pipe([prompt.text] * config.noises, **options).images.float())
        advance()
    images, asked = torch.cat(parts), [prompt for prompt in prompts for _ in range(config.noises)]
    with torch.no_grad():
        scores = reward(images, asked)
    shape = (len(prompts), config.noises)
    correct = judge(images, asked).correct
    return Sheet(title, images.unflatten(0, shape), correct.view(shape), scores.view(shape))


def draw(path: Path, title: str, prompts: list[Prompt], sheets: list[Sheet]) -> None:
    """The contact sheet: a row for each prompt, the models side by side."""
    from matplotlib.figure import Figure

    noises, wide = sheets[0].images.shape[1], 0.35
    ratios = [1.0] * noises + ([wide] + [1.0] * noises) * (len(sheets) - 1)
    size = (0.95 * sum(ratios) + 2.6, 1.12 * len(prompts) + 1.0)
    figure = Figure(figsize=size)
    left, top = 2.6 / size[0], 1 - 0.8 / size[1]
    grid = figure.add_gridspec(len(prompts), len(ratios), width_ratios=ratios, left=left, right=0.995, top=top,
                               bottom=0.2 / size[1], wspace=0.08, hspace=0.3)  # fmt: skip
    for s, part in enumerate(sheets):
        first = s * (noises + 1)
        for row, prompt in enumerate(prompts):
            for n in range(noises):
                axes = figure.add_subplot(grid[row, first + n])
                _picture(axes, part, row, n)
                if s == n == 0:
                    axes.annotate(
                        prompt.text, (-0.1, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=9
                    )
        middle = (sum(ratios[:first]) + noises / 2) / sum(ratios)
        figure.text(left + middle * (0.995 - left), top + 0.1 / size[1], part.told, ha="center", fontsize=10)
    figure.text(0.01, 1 - 0.25 / size[1], f"{title}; columns: noises, the same for all\n"
                "frame and mark: the rules' verdict; number: the reward", fontsize=9, va="center")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _picture(axes: Any, part: Sheet, row: int, n: int) -> None:
    right = bool(part.correct[row, n])
    colour = RIGHT if right else WRONG
    axes.imshow(part.images[row, n].permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{'✓' if right else '✗'} {float(part.reward[row, n]):.2f}", fontsize=7, color=colour, labelpad=1)
    axes.spines[:].set_color(colour)


def main(config: Preview) -> Path:
    """Draws the sheet and says where it is.

    Raises:
        RecipeError: the run's folder holds no tuned weights, or a prompt can't be said.
    """
    from diffusers.utils import logging as bars
    from rich.progress import Progress
    from transformers.utils import logging as more_bars

    from trajsurgery.tiny.pipe import pipeline
    from trajsurgery.tiny.scorer import Reward

    torch.set_num_threads(config.threads)
    bars.disable_progress_bar()
    more_bars.disable_progress_bar()
    prompts = chosen(config)
    after = None if config.run is None else tuned(config.run)
    pipe, reward = pipeline(), Reward()
    with Progress(transient=True) as progress:
        task = progress.add_task("drawing", total=len(prompts) * (1 if after is None else 2))

        def of(title: str) -> Sheet:
            return sheet(title, pipe, reward, prompts, config, lambda: progress.advance(task))

        sheets = [of("untuned")]
        if after is not None:
            pipe.transformer = after.eval()
            sheets.append(of("tuned"))
    path = config.output or (config.run or Path("outputs")) / "preview.png"
    draw(path, "The embedded Flux" if config.run is None else f"Tuned: {config.run}", prompts, sheets)
    print("\n".join([*(part.told for part in sheets), f"Picture: {path}"]))
    return path


if __name__ == "__main__":
    import sys

    import tyro

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        main(tyro.cli(Preview, description=__doc__))
    except RecipeError as error:
        sys.exit(f"RecipeError: {error}")
