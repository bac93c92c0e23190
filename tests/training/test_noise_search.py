"""ReNO: the noise gradient against autograd through the pipeline's denoising loop; ascent steps against formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.builders import toy_world
from tests.repository.test_recipes import load_recipe
from tests.tolerances import EXACT, STOCK, VALUE
from trajsurgery.cli.noise_command import main
from trajsurgery.cli.recipe_script import cli
from trajsurgery.errors import RecipeError
from trajsurgery.runs.reports.filmstrip import choose_frames
from trajsurgery.tiny.pipe import TEXT_LENGTH
from trajsurgery.training.components import quiet
from trajsurgery.training.noise.noise_recipe import AscentSettings, NoiseRecipe, presets
from trajsurgery.training.noise.noise_search import Ascent, RewardPath, negative_log_density

RECIPE = Path(__file__).parents[2] / "recipes/reno_flux.py"
PROMPT = "a red circle"
CALL = {"prompt": [PROMPT], "height": 16, "width": 16, "guidance_scale": 3.5}


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A nonlinear reward: the gradient at any other image would differ."""
    assert len(images) == len(prompts) == 1
    return (images[:, 0] - images[:, 1]).sin().mean((-1, -2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = toy_world.pipeline()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reward_path(pipe: Any, steps: int = 2, memory: Any = None) -> RewardPath:
    return RewardPath(pipe, red, PROMPT, steps, CALL, memory)


def by_autograd(pipe: Any, x: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, score and gradient by autograd through the pipeline's own undecorated `__call__`."""
    start = x.clone().requires_grad_()
    loop = type(pipe).__call__.__wrapped__
    image = loop(pipe, **CALL, latents=start, num_inference_steps=steps, output_type="pt")[0]
    score = red(image, [PROMPT])
    return image, score, torch.autograd.grad(score.sum(), start)[0]


@pytest.mark.parametrize("memory", ["retain", "recompute"])
@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_the_gradient_is_autograd_s_through_the_pipeline_s_own_loop(pipe: Any, steps: int, memory: str) -> None:
    """Float32 bit for bit; float64 up to the float32 casts inside diffusers' scheduler and Flux's RoPE."""
    for dtype, tolerance in ((torch.float64, STOCK), (torch.float32, 0.0)):
        with quiet():
            pipe.to(dtype)
        path = reward_path(pipe, steps, memory)
        x = path.start(torch.Generator().manual_seed(3))
        assert x.dtype == dtype
        expected = by_autograd(pipe, x, steps)
        actual = path.score_gradient(x)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        assert expected[2].norm() > 0
        assert (actual[2] - expected[2]).norm() <= tolerance * expected[2].norm()


def test_the_start_is_the_noise_that_the_pipeline_draws(pipe: Any) -> None:
    images = [pipe(**CALL, num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt")[0]]
    images.append(reward_path(pipe).score_gradient(reward_path(pipe).start(torch.Generator().manual_seed(5)))[0])
    assert torch.equal(*images)


def test_the_penalty_is_the_negative_log_density_of_the_norm() -> None:
    """|x| of d normal numbers has the density of chi: r^(d-1) exp(-r^2 / 2), up to a constant."""
    d, radii = 7, (0.5, 2.0, 3.3)
    x = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = x / x.norm()
    logs = [float(negative_log_density(r * unit)) for r in radii]
    density = [math.log(r ** (d - 1) * math.exp(-r * r / 2)) for r in radii]
    for a, b in zip(logs[1:], density[1:], strict=True):
        assert abs((a - logs[0]) + (b - density[0])) < VALUE[torch.float64] * 10
    least = (unit * math.sqrt(d - 1)).requires_grad_()
    negative_log_density(least).backward()
    assert least.grad is not None
    assert least.grad.norm() < EXACT * 10


class LinearPath:
    """A reward path whose score is an inner product: its gradient is the direction."""

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    def score_gradient(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(1, 3, 4, 4), (x.detach() * self.direction).sum()[None], self.direction.clone()


def test_a_step_is_nesterov_s_with_the_clipped_gradient() -> None:
    """Sutskever's form: m = momentum m + g, x = x - rate (g + momentum m)."""
    g = torch.Generator().manual_seed(1)
    start, direction = (torch.randn(1, 9, generator=g, dtype=torch.float64) for _ in range(2))
    climb = AscentSettings(rate=0.7, momentum=0.8, clip=0.3, penalty=0.05, weight=2.0)
    ascent, x, m = Ascent(start, climb), start.clone(), torch.zeros_like(start)
    for i in range(4):
        frame = ascent.step(LinearPath(direction))  # pyright: ignore[reportArgumentType]
        assert frame.iteration == i
        assert abs(frame.reward - float((x * direction).sum())) < VALUE[torch.float64] * 10
        gradient = 0.05 * (x - 8 * x / x.square().sum()) - 2 * direction
        assert abs(frame.gradient - float(gradient.norm())) < VALUE[torch.float64] * 10
        gradient = gradient * min(1.0, 0.3 / (float(gradient.norm()) + 1e-6))  # torch's clipping adds 1e-6
        m = 0.8 * m + gradient
        x = x - 0.7 * (gradient + 0.8 * m)
        torch.testing.assert_close(ascent.x.detach(), x, rtol=EXACT * 10, atol=EXACT * 10)


def recipe(folder: Path, **changes: Any) -> NoiseRecipe:
    return replace(presets("")["tiny"], prompt=PROMPT, size=16, iterations=8, save_every=3, output=folder, **changes)


def test_the_reward_rises_and_all_files_are_written(tmp_path: Path, pipe: Any) -> None:
    summary = main(recipe(tmp_path), (pipe, red))
    assert summary is not None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines]
    assert len(rewards) == 8
    assert summary["best"] == max(rewards) > rewards[0] == summary["first"]
    assert rewards[1] > rewards[0]
    with Image.open(tmp_path / "filmstrip.png") as film:
        assert film.width > 1000
    latents = load_file(tmp_path / "noise.safetensors")["latents"]
    image = pipe(**CALL, latents=latents, num_inference_steps=2, max_sequence_length=TEXT_LENGTH, output_type="pt")[0]
    assert abs(float(red(image, [PROMPT])) - summary["best"]) < VALUE[torch.float32]
    with Image.open(tmp_path / "best.png") as best:
        assert best.size == (16, 16)


class Interrupts:
    """Raises KeyboardInterrupt in the middle of an iteration, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after + 1  # one more: the check of the reward before the first iteration

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return red(images, prompts)


def test_an_interrupted_search_resumes_to_the_same_noise(tmp_path: Path, pipe: Any) -> None:
    assert main(recipe(tmp_path / "whole"), (pipe, red)) is not None
    assert main(recipe(tmp_path / "parts"), (pipe, Interrupts(5))) is None
    assert (tmp_path / "parts/filmstrip.png").exists()
    assert main(recipe(tmp_path / "parts"), (pipe, red)) is not None
    for name in ("metrics.jsonl", "noise.safetensors", "best.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    with pytest.raises(RecipeError, match="seed: 0 there, 1 here"):
        main(recipe(tmp_path / "parts", seed=1), (pipe, red))
    with pytest.raises(RecipeError, match="8 iterations, more than the 4"):
        main(replace(recipe(tmp_path / "parts"), iterations=4), (pipe, red))
    assert main(replace(recipe(tmp_path / "parts", overwrite=True, seed=1), iterations=1), (pipe, red)) is not None


def test_a_diverging_search_is_an_error_that_names_the_rate(tmp_path: Path, pipe: Any) -> None:
    def non_finite(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return red(images, prompts) / 0 if images.requires_grad else red(images, prompts)

    with pytest.raises(RecipeError, match=r"--climb\.rate"):
        main(recipe(tmp_path), (pipe, non_finite))


def test_a_detached_reward_is_an_error(pipe: Any) -> None:
    path = RewardPath(pipe, lambda images, prompts: red(images, prompts).detach(), PROMPT, 1, CALL)
    with pytest.raises(RecipeError, match="carry no gradient"):
        path.score_gradient(path.start(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no/such"], "no weights: no/such"),
        (["--reward", "nothing"], "no reward 'nothing'"),
        (["--model", "tiny:wan"], "makes videos"),
        (["--steps", "0"], "steps = 0"),
        (["--climb.momentum", "1"], "momentum = 1.0"),
        (["--prompt", " "], "the prompt is empty"),
    ],
)
def test_invalid_flags_are_refused_before_loading(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli(load_recipe(RECIPE).RECIPES, "words", [*flags, "--output", str(tmp_path / "run")])
    except SystemExit as stop:  # raised by tyro
        code = stop.code
    assert code != 0
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert not (tmp_path / "run").exists()


def test_the_frames_shown_are_dense_at_the_start() -> None:
    assert choose_frames(50, 8) == [0, 1, 2, 4, 8, 15, 28, 49]
    for count in (1, 2, 5, 9, 33):
        for pictures in (1, 2, 3, 8):
            frames = choose_frames(count, pictures)
            assert frames == sorted(set(frames))
            assert len(frames) == min(count, pictures)
            assert frames[0] == 0
            assert pictures == 1 or frames[-1] == count - 1
