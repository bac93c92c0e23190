"""`python -m benchmarks.world.preview`: a sheet of pictures by an embedded model, untuned and, with --run, tuned.

A row is a held-out prompt, a column a noise, the same for all prompts and both models; frames of a video stand side by
side. Each picture carries the rules' verdict and its reward.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from benchmarks.world.preview_models import PreviewModel, preview_model
from trajsurgery.errors import RecipeError
from trajsurgery.tiny.pipe import PipelineName

RIGHT, WRONG = "#2e7d32", "#b3442e"
GAP = 1  # white pixels between the frames of a video


@dataclass(frozen=True)
class Preview:
    """What to draw, and where."""

    run: Path | None = None
    """Output folder of a finished run on an embedded model, such as outputs/leapalign_flux; by default the base alone.
    """
    model: PipelineName = "flux"
    """The embedded model to draw without a run."""
    prompts: tuple[str, ...] = ()
    """Prompts of the model's world; by default `each` held-out ones of every category."""
    each: int = 2
    """Held-out prompts of every category; for Wan, of every direction."""
    noises: int | None = None
    """Pictures of each prompt; by default 4, or 2 videos."""
    steps: int = 25
    """Sampler steps."""
    seed: int = 0
    """Of the noises."""
    output: Path | None = None
    """The picture's file; by default preview.png in the run's folder, or outputs/preview.png."""
    threads: int = 1

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("each", "noises", "steps", "threads")}
        wrong = [name for name, count in counts.items() if count is not None and count < 1]
        if wrong:
            raise RecipeError(f"{' and '.join(wrong)}: at least 1.")


@dataclass(frozen=True, eq=False)
class Sheet:
    """The pictures of one model, prompt by prompt, with verdicts and rewards."""

    title: str
    images: Tensor
    """Float[prompts noises 3 h w], or [prompts noises frames 3 h w]."""
    correct: Tensor
    """Bool[prompts noises]."""
    reward: Tensor
    """Float[prompts noises]."""

    @property
    def told(self) -> str:
        """The title with the means."""
        right, reward = float(self.correct.float().mean()), float(self.reward.mean())
        return f"{self.title}: {right:.0%} right, reward {reward:.3f}"


def run_settings(run: Path) -> dict[str, Any]:
    """Return the recipe of a finished run on an embedded model.

    Raises:
        RecipeError: the folder holds no tuned weights, or those of another model.
    """
    recipe = run / "recipe.json"
    if not (run / "transformer" / "config.json").is_file():
        raise RecipeError(
            f"{run / 'transformer'} holds no tuned weights: let the run end first, or pass --run with another folder."
        )
    recipe_dict = json.loads(recipe.read_text()) if recipe.is_file() else {"model": "tiny"}
    if recipe_dict["model"].partition(":")[0] != "tiny":
        raise RecipeError(
            f"{run} holds a run of {recipe_dict['model']}: this draws the embedded models, tiny and tiny:NAME."
        )
    return recipe_dict


def find_model(config: Preview) -> PreviewModel:
    """Return the untuned model, called as the run calls it.

    Raises:
        RecipeError: as `run_settings`.
    """
    if config.run is None:
        return preview_model(config.model)
    recipe = run_settings(config.run)
    model = preview_model(recipe["model"].partition(":")[2] or "flux")
    if "guidance_scale" in model.call and "rollout" in recipe:
        model.call["guidance_scale"] = recipe["rollout"]["guidance"]
    return model


def find_prompts(config: Preview, model: PreviewModel) -> list[Any]:
    """Return the prompts to draw.

    Raises:
        RecipeError: the model's world does not know one of them.
    """
    try:
        return model.understand(config.prompts) if config.prompts else model.evenly(config.each)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def draw_sheet(title: str, model: PreviewModel, prompts: list[Any], config: Preview, advance: Any) -> Sheet:
    """Draw and judge all pictures of one model; call `advance()` after each prompt."""
    noises = config.noises or model.columns
    noise = torch.randn(noises, *model.noise, generator=Generator().manual_seed(config.seed))
    parts: list[Tensor] = []
    for prompt in prompts:
        options: dict[str, Any] = {"num_inference_steps": config.steps, "latents": noise, "output_type": "pt"}
        parts.append(model.pipe([prompt.text] * noises, **options, **model.call)[0].float())
        advance()
    images, repeated_prompts = torch.cat(parts), [prompt for prompt in prompts for _ in range(noises)]
    with torch.no_grad():
        scores = model.reward(images, repeated_prompts)
    shape = (len(prompts), noises)
    correct = model.judge(images, repeated_prompts).correct
    return Sheet(title, images.unflatten(0, shape), correct.view(shape), scores.view(shape))


def frames_side_by_side(picture: Tensor) -> Tensor:
    """Return Float[3 h w]; frames of a video, Float[frames 3 h w], are set side by side."""
    if picture.dim() == 3:
        return picture
    framed = functional.pad(picture, (0, GAP), value=1.0)
    return framed.permute(1, 2, 0, 3).flatten(2)[..., :-GAP]


def save_sheet(path: Path, title: str, prompts: list[Any], sheets: list[Sheet]) -> None:
    """Save the contact sheet: a row for each prompt, the models side by side."""
    from matplotlib.figure import Figure

    images = sheets[0].images
    noises, frames = images.shape[1], images.shape[2] if images.dim() == 6 else 1
    wide, gap = 1.0 if frames == 1 else 0.7 * frames, 0.35
    ratios = [wide] * noises + ([gap] + [wide] * noises) * (len(sheets) - 1)
    size = (0.95 * sum(ratios) + 2.6, (1.12 if frames == 1 else 0.92) * len(prompts) + 1.0)
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
        middle = (sum(ratios[:first]) + noises * wide / 2) / sum(ratios)
        figure.text(left + middle * (0.995 - left), top + 0.1 / size[1], part.told, ha="center", fontsize=10)
    figure.text(0.01, 1 - 0.25 / size[1], f"{title}; columns: noises, the same for all\n"
                "frame and mark: the rules' verdict; number: the reward", fontsize=9, va="center")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _picture(axes: Any, part: Sheet, row: int, n: int) -> None:
    right = bool(part.correct[row, n])
    colour = RIGHT if right else WRONG
    axes.imshow(
        frames_side_by_side(part.images[row, n]).permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1
    )
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{'✓' if right else '✗'} {float(part.reward[row, n]):.2f}", fontsize=7, color=colour, labelpad=1)
    axes.spines[:].set_color(colour)


def main(config: Preview) -> Path:
    """Draw the sheet and print where it is.

    Raises:
        RecipeError: the run's folder holds no tuned weights, or a prompt is unknown.
    """
    from diffusers.utils import logging as bars
    from rich.progress import Progress
    from transformers.utils import logging as more_bars

    torch.set_num_threads(config.threads)
    bars.disable_progress_bar()
    more_bars.disable_progress_bar()
    model = find_model(config)
    prompts = find_prompts(config, model)
    with Progress(transient=True) as progress:
        task = progress.add_task("drawing", total=len(prompts) * (1 if config.run is None else 2))

        def of(title: str) -> Sheet:
            return draw_sheet(title, model, prompts, config, lambda: progress.advance(task))

        sheets = [of("untuned")]
        if config.run is not None:
            transformer = type(model.pipe.transformer).from_pretrained(config.run / "transformer")
            model.pipe.transformer = transformer.eval()
            sheets.append(of("tuned"))
    path = config.output or (config.run or Path("outputs")) / "preview.png"
    save_sheet(path, model.name if config.run is None else f"Tuned: {config.run}", prompts, sheets)
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
