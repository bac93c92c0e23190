"""The noise search command (ReNO): from a noise recipe to a film strip.

Its checkpoint is one file, written whole: the same command resumes an interrupted search.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from trajsurgery.errors import RecipeError
from trajsurgery.rewards.loading import Reward, load_reward, reward_problem, score_one
from trajsurgery.runs.reports.filmstrip import draw_filmstrip
from trajsurgery.training import components
from trajsurgery.training.checkpoints.output_files import lock_folder, write_atomically
from trajsurgery.training.checks import preflight
from trajsurgery.training.distributed import ranks
from trajsurgery.training.noise.noise_recipe import NoiseRecipe
from trajsurgery.training.noise.noise_search import Ascent, Frame, RewardPath
from trajsurgery.training.progress_bar import progress_bar
from trajsurgery.training.recipe import EMBEDDED, changed_settings
from trajsurgery.training.training_loop import catch_interruptions

STATE, THUMBNAIL = "noise_state.pt", 256
FREE = ("iterations", "save_every", "pictures", "threads", "device", "output", "overwrite")
"""Settings that may differ between a search and its resumption."""


def main(
    recipe: NoiseRecipe, parts: tuple[Any, Reward] | None = None, console: Console | None = None
) -> dict[str, Any] | None:
    """Run a search, or resume one that was interrupted.

    Args:
        parts: pipeline and reward, if they should not be loaded from the recipe's names.

    Returns:
        {"first": reward, "best": reward, "iteration": of the best}; None if the run was interrupted (it is saved).

    Raises:
        RecipeError: the run can't start here, the output folder is in use or holds another recipe's, or the search
            diverged.
    """
    console = console or Console()
    if parts is None:
        check_noise_recipe(recipe)
    with lock_folder(recipe.output):
        return _run(recipe, parts, console)


def _run(recipe: NoiseRecipe, parts: tuple[Any, Reward] | None, console: Console) -> dict[str, Any] | None:
    torch.set_num_threads(recipe.threads)
    state = _read_state(recipe)
    path = _reward_path(recipe, *(parts or _load_components(recipe)))
    ascent = Ascent(path.start(torch.Generator().manual_seed(recipe.seed)), recipe.climb)
    film = _Film(state["frames"], state["images"]) if state else _Film()
    if state:
        ascent.restore(state)
        console.print(f"goes on from iteration {ascent.iteration} in {recipe.output}", highlight=False)
    signals: list[int] = []
    try:
        with (
            catch_interruptions() as signals,
            progress_bar(console, "ReNO", recipe.iterations, ascent.iteration) as advance,
        ):
            while ascent.iteration < recipe.iterations and not signals:
                frame = ascent.step(path)
                film.add(frame)
                best = film.best["reward"]
                advance(figures=f"reward {frame.reward:.4f} best {best:.4f} |x_T| {frame.norm:.1f}")
                if ascent.iteration % recipe.save_every == 0:
                    _save_state(recipe, ascent, film)
    except KeyboardInterrupt:  # a second one does not wait for the iteration under way
        signals = [1]
    finally:
        if ascent.best is not None:
            _save_state(recipe, ascent, film)
            _save_results(recipe, ascent, film)
    complete = not signals or ascent.iteration >= recipe.iterations
    if not complete:
        console.print(f"interrupted at iteration {ascent.iteration}, saved: the same command goes on from there")
    return _print_summary(recipe, film, console) if complete else None


def check_noise_recipe(recipe: NoiseRecipe) -> None:
    """Raise if the search can't run here.

    Raises:
        RecipeError: what is missing, and what to do.
    """
    problems = (preflight.model_problem(recipe.source), reward_problem(recipe.reward))
    missing, count = [problem for problem in problems if problem], preflight.parameter_count(recipe.source) or 0
    if count > preflight.WITHOUT_GPU and not torch.cuda.is_available():
        missing.append(f"no GPU: torch sees no CUDA device, and {recipe.model} has {count / 1e9:.1f} G parameters.")
    if EMBEDDED.get(recipe.model, "tiny") != "tiny":
        missing.append(f"{recipe.model} makes videos: this search scores one image.")
    if missing:
        raise RecipeError("\n".join(["this recipe can't run here:", *(f"  - {line}" for line in missing)]))


def _load_components(recipe: NoiseRecipe) -> tuple[Any, Reward]:
    with components.quiet():
        device = ranks.choose_device(recipe.device)
        pipe = components.load_pipeline(recipe.source, device).to(device)
        return pipe, load_reward(recipe.reward, pipe.transformer.device)


def _reward_path(recipe: NoiseRecipe, pipe: Any, reward: Reward) -> RewardPath:
    """Freeze the pipeline, score a grey image, and encode the prompt."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    side = recipe.size or 64
    score_one(recipe.reward, reward, torch.full((1, 3, side, side), 0.5, device=pipe.transformer.device), recipe.prompt)
    size = {"height": recipe.size, "width": recipe.size} if recipe.size else {}
    call = {**components.PromptCache(pipe, [recipe.prompt])([recipe.prompt]), "guidance_scale": recipe.guidance, **size}
    return RewardPath(pipe, reward, recipe.prompt, recipe.steps, call)


@dataclass(frozen=True)
class _Film:
    """Figures of each iteration, and small images."""

    frames: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    images: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def best(self) -> dict[str, Any]:
        """The figures of the iteration with the highest reward."""
        return max(self.frames, key=lambda frame: frame["reward"])

    def add(self, frame: Frame) -> None:
        """Append an image, at most THUMBNAIL pixels wide."""
        self.frames.append({name: value for name, value in vars(frame).items() if name != "image"})
        by = max(1, -(-frame.image.shape[-1] // THUMBNAIL))
        self.images.append(_to_uint8(torch.nn.functional.avg_pool2d(frame.image.float(), by)[0]))


def _to_uint8(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _save_state(recipe: NoiseRecipe, ascent: Ascent, film: _Film) -> None:
    state = {"recipe": json.dumps(recipe.to_dict()), **ascent.state(), **vars(film)}
    write_atomically(recipe.output / STATE, lambda path: torch.save(state, path))


_WAYS_OUT = "Pass --overwrite to discard that run, or --output with another folder."


def _read_state(recipe: NoiseRecipe) -> dict[str, Any] | None:
    """Return the checkpoint in the output folder, None without one; raise if it is of another search."""
    path = recipe.output / STATE
    if recipe.overwrite or not path.exists():
        path.unlink(missing_ok=True)
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved_settings = json.loads(state["recipe"])
    except Exception as error:
        raise RecipeError(f"{path} can't be read ({error}). {_WAYS_OUT}") from error
    changed = changed_settings(saved_settings, recipe.to_dict(), FREE)
    if changed:
        raise RecipeError(f"{recipe.output} holds another search. It differs in {'; '.join(changed)}. {_WAYS_OUT}")
    if state["iteration"] > recipe.iterations:
        raise RecipeError(
            f"{recipe.output} holds {state['iteration']} iterations, more than the {recipe.iterations} of this one. "
            f"{_WAYS_OUT}"
        )
    return state


def _save_results(recipe: NoiseRecipe, ascent: Ascent, film: _Film) -> None:
    """Save pictures, figures, and the noise for `pipe(latents=...)`."""
    from PIL import Image
    from safetensors.torch import save_file

    assert ascent.best is not None
    frame, x = ascent.best
    recipe.output.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_to_uint8(frame.image[0]).permute(1, 2, 0).numpy()).save(recipe.output / "best.png")
    save_file({"latents": x.cpu().contiguous()}, recipe.output / "noise.safetensors")
    lines = "".join(json.dumps(line) + "\n" for line in film.frames)
    write_atomically(recipe.output / "metrics.jsonl", lambda path: path.write_text(lines))
    steps = f"{recipe.steps} step{'s' * (recipe.steps > 1)}"
    title = f"“{recipe.prompt}”: {recipe.model} in {steps}, reward {recipe.reward}"
    draw_filmstrip(recipe.output / "filmstrip.png", title, film.frames, film.images, recipe.pictures)


def _print_summary(recipe: NoiseRecipe, film: _Film, console: Console) -> dict[str, Any]:
    """Print the rewards and where the files are; return the rewards."""
    best, first = film.best, film.frames[0]["reward"]
    console.print(
        f"reward {first:.4f} -> {best['reward']:.4f} at iteration {best['iteration']}. In {recipe.output}: "
        "filmstrip.png, best.png, metrics.jsonl, and noise.safetensors, whose latents the pipeline takes: "
        f"pipe(prompt, latents=latents, num_inference_steps={recipe.steps}, guidance_scale={recipe.guidance})",
        highlight=False,
    )
    return {"first": first, "best": best["reward"], "iteration": best["iteration"]}
