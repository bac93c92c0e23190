"""The command that searches for one prompt's noise (ReNO): from a noise recipe to a film strip.

What it goes on from is one file, written whole: a run that was interrupted goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from trajsurgery.errors import RecipeError, SurgeryError
from trajsurgery.reports.filmstrip import filmstrip
from trajsurgery.rewards.by_name import Reward, ask, scorer
from trajsurgery.training import components, preflight
from trajsurgery.training.checkpoint import write_whole
from trajsurgery.training.noise_search.ascent import Ascent, Frame, Way
from trajsurgery.training.noise_search.noise_recipe import NoiseRecipe
from trajsurgery.training.recipe import EMBEDDED
from trajsurgery.training.training_loop import interruptions

STATE, INTERRUPTED, THUMBNAIL = "noise_state.pt", 130, 256
FREE = ("iterations", "save_every", "pictures", "threads", "output", "overwrite")
"""What may differ between a search and the one that goes on with it."""


def cli(recipes: Mapping[str, NoiseRecipe], description: str, args: Sequence[str] | None = None) -> int:
    """Reads a recipe from the command line and runs it; returns the exit code."""
    console, given = Console(), list(sys.argv[1:] if args is None else args)
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", choices=list(recipes), default=next(iter(recipes)))
    preset = recipes[chosen.parse_known_args(given)[0].preset]
    try:
        recipe = tyro.cli(NoiseRecipe, default=preset, args=given, description=description, console_outputs=True)
        return INTERRUPTED if main(recipe, console=console) is None else 0
    except KeyboardInterrupt:
        console.print("interrupted before the first iteration: the same command goes on")
        return INTERRUPTED
    except SurgeryError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1


def main(
    recipe: NoiseRecipe, parts: tuple[Any, Reward] | None = None, console: Console | None = None
) -> dict[str, Any] | None:
    """Runs a search; goes on with one that was interrupted.

    Args:
        parts: pipe and reward, if the recipe's names are not to be resolved.

    Returns:
        {"first": reward, "best": reward, "iteration": of the best}; None if the run was interrupted (it is saved).

    Raises:
        RecipeError: the run can't start here, the output folder holds another recipe's, or the noise ran away.
    """
    console = console or Console()
    if parts is None:
        check(recipe)
    torch.set_num_threads(recipe.threads)
    state = _read(recipe)
    way = _way(recipe, *(parts or _load(recipe)))
    ascent = Ascent(way.start(torch.Generator().manual_seed(recipe.seed)), recipe.climb)
    film = _Film.of(ascent, state)
    if state:
        console.print(f"goes on from iteration {ascent.iteration} in {recipe.output}", highlight=False)
    asked: list[int] = []
    try:
        with interruptions() as asked, _progress(recipe, film, console) as watch:
            while ascent.iteration < recipe.iterations and not asked:
                film.add(ascent.step(way))
                watch()
                if ascent.iteration % recipe.save_every == 0:
                    _save(recipe, ascent, film)
    except KeyboardInterrupt:  # a second one does not wait for the iteration under way
        asked = [1]
    finally:
        if ascent.best is not None:
            _save(recipe, ascent, film)
            _show(recipe, ascent, film)
    whole = not asked or ascent.iteration >= recipe.iterations
    if not whole:
        console.print(f"interrupted at iteration {ascent.iteration}, saved: the same command goes on from there")
    return _said(recipe, film, console) if whole else None


def check(recipe: NoiseRecipe) -> None:
    """Stops a run that can't start.

    Raises:
        RecipeError: what is missing, and what to do.
    """
    count = preflight.parameters(recipe.model)
    missing = [
        line for line in (preflight.lacking_model(recipe.model), preflight.lacking_reward(recipe.reward)) if line
    ]
    if count is not None and count > preflight.WITHOUT_GPU and not torch.cuda.is_available():
        missing.append(f"no GPU: torch sees no CUDA device, and {recipe.model} has {count / 1e9:.1f} G parameters.")
    if EMBEDDED.get(recipe.model, "tiny") != "tiny":
        missing.append(f"{recipe.model} paints videos: this search grades one image.")
    if missing:
        raise RecipeError("\n".join(["this recipe can't run here:", *(f"  - {line}" for line in missing)]))


def _load(recipe: NoiseRecipe) -> tuple[Any, Reward]:
    with components.quiet():
        pipe = components.pipeline(recipe.model)
        return pipe, scorer(recipe.reward, pipe.transformer.device)


def _way(recipe: NoiseRecipe, pipe: Any, reward: Reward) -> Way:
    """Pipe and reward, frozen and tried on a grey image; the prompt is encoded once."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    side = recipe.size or 64
    ask(recipe.reward, reward, torch.full((1, 3, side, side), 0.5, device=pipe.transformer.device), recipe.prompt)
    size = {"height": recipe.size, "width": recipe.size} if recipe.size else {}
    call = {**components.Embeddings(pipe, [recipe.prompt])([recipe.prompt]), "guidance_scale": recipe.guidance, **size}
    return Way(pipe, reward, recipe.prompt, recipe.steps, call)


class _Film:
    """What the ascent has left so far: figures of each iteration, and small images."""

    def __init__(self, frames: list[dict[str, Any]], images: list[Tensor]) -> None:
        self.frames, self.images = frames, images

    @classmethod
    def of(cls, ascent: Ascent, state: Mapping[str, Any] | None) -> _Film:
        """The film of a state, to which the ascent is brought back; an empty one without a state."""
        if state is None:
            return cls([], [])
        with torch.no_grad():
            ascent.x.copy_(state["x"])
        ascent.optimiser.load_state_dict(state["optimiser"])
        ascent.iteration = state["iteration"]
        ascent.best = Frame(**state["best"]), state["best_x"].to(ascent.x)
        return cls(list(state["frames"]), list(state["images"]))

    def add(self, frame: Frame) -> None:
        """Another image, kept at most THUMBNAIL pixels wide."""
        names = ("iteration", "reward", "norm", "gradient")
        self.frames.append({name: getattr(frame, name) for name in names})
        by = max(1, -(-frame.image.shape[-1] // THUMBNAIL))
        self.images.append(_bytes(torch.nn.functional.avg_pool2d(frame.image.float(), by)[0]))


def _bytes(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _save(recipe: NoiseRecipe, ascent: Ascent, film: _Film) -> None:
    assert ascent.best is not None
    frame, x = ascent.best
    state = {
        "recipe": json.dumps(recipe.to_dict()),
        "x": ascent.x.detach(),
        "optimiser": ascent.optimiser.state_dict(),
        "iteration": ascent.iteration,
        "best": {name: getattr(frame, name) for name in Frame.__dataclass_fields__},
        "best_x": x,
        "frames": film.frames,
        "images": film.images,
    }
    write_whole(recipe.output / STATE, lambda path: torch.save(state, path))


_WAYS_OUT = "Pass --overwrite to discard that run, or --output with another folder."


def _read(recipe: NoiseRecipe) -> dict[str, Any] | None:
    """The state that the output folder holds; None if the run is to start.

    Raises:
        RecipeError: it is another recipe's, goes further than this one, or can't be read.
    """
    path = recipe.output / STATE
    if recipe.overwrite or not path.exists():
        path.unlink(missing_ok=True)
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        there = json.loads(state["recipe"])
    except Exception as error:
        raise RecipeError(f"{path} can't be read ({error}). {_WAYS_OUT}") from error
    here = recipe.to_dict()
    changed = [f"{n}: {there.get(n)} there, {here[n]} here" for n in here if n not in FREE and there.get(n) != here[n]]
    if changed:
        raise RecipeError(f"{recipe.output} holds another search. It differs in {'; '.join(changed)}. {_WAYS_OUT}")
    if state["iteration"] > recipe.iterations:
        raise RecipeError(
            f"{recipe.output} holds {state['iteration']} iterations, more than the {recipe.iterations} asked for. "
            f"{_WAYS_OUT}"
        )
    return state


def _show(recipe: NoiseRecipe, ascent: Ascent, film: _Film) -> None:
    """Everything there is to look at, and the noise for `pipe(latents=...)`."""
    from PIL import Image
    from safetensors.torch import save_file

    assert ascent.best is not None
    frame, x = ascent.best
    recipe.output.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_bytes(frame.image[0]).permute(1, 2, 0).numpy()).save(recipe.output / "best.png")
    save_file({"latents": x.cpu().contiguous()}, recipe.output / "noise.safetensors")
    lines = "".join(json.dumps(line) + "\n" for line in film.frames)
    write_whole(recipe.output / "metrics.jsonl", lambda path: path.write_text(lines))
    steps = f"{recipe.steps} step{'s' * (recipe.steps > 1)}"
    title = f"“{recipe.prompt}”: {recipe.model} in {steps}, reward {recipe.reward}"
    filmstrip(recipe.output / "filmstrip.png", title, film.frames, film.images, recipe.pictures)


def _said(recipe: NoiseRecipe, film: _Film, console: Console) -> dict[str, Any]:
    """The closing words."""
    best = max(film.frames, key=lambda frame: frame["reward"])
    first = film.frames[0]["reward"]
    console.print(
        f"reward {first:.4f} -> {best['reward']:.4f} at iteration {best['iteration']}. In {recipe.output}: "
        "filmstrip.png, best.png, metrics.jsonl, and noise.safetensors, whose latents the pipeline takes: "
        f"pipe(prompt, latents=latents, num_inference_steps={recipe.steps}, guidance_scale={recipe.guidance})",
        highlight=False,
    )
    return {"first": first, "best": best["reward"], "iteration": best["iteration"]}


@contextmanager
def _progress(recipe: NoiseRecipe, film: _Film, console: Console) -> Generator[Callable[[], None]]:
    """A bar with reward, its best, and the noise's norm; a plain line now and then where there is no terminal."""
    columns = (TextColumn("ReNO"), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    every, began, before = max(1, recipe.iterations // 10), time.monotonic(), len(film.frames)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=recipe.iterations, completed=before, figures="")

        def watch() -> None:
            here, done = film.frames[-1], len(film.frames)
            best = max(frame["reward"] for frame in film.frames)
            figures = f"reward {here['reward']:.4f} best {best:.4f} |x_T| {here['norm']:.1f}"
            progress.update(task, completed=done, figures=figures)
            if not console.is_terminal and done % every == 0:
                left = (time.monotonic() - began) / (done - before) * (recipe.iterations - done)
                console.print(f"ReNO {done}/{recipe.iterations} {figures} about {left:.0f} s left", highlight=False)

        yield watch
