"""Measurements of the shipped weights: evaluator, autoencoder, base model and reward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.world.compose import compose
from benchmarks.world.fit_vae import reconstructions
from benchmarks.world.hard_negatives import hard_negatives
from benchmarks.world.render import render
from trajsurgery.tiny.prompt import CATEGORIES, Prompt, Split, meanings, split_prompts
from trajsurgery.tiny.rules import Verdict, judge

Figures = dict[str, float]


def even_prompts(split: Split, each: int) -> list[Prompt]:
    """Return `each` prompts of every category of a split, its prompts repeated in turn."""
    groups = [[prompt for prompt in split_prompts(split) if prompt.category == c] for c in CATEGORIES]
    return [group[i % len(group)] for group in groups for i in range(each)]


def renders(prompts: list[Prompt], seed: int) -> Tensor:
    """Render a clean picture that is right for each prompt, Float[prompts 3 32 32]."""
    return render(compose(meanings(prompts), Generator().manual_seed(seed)))


def negatives(prompt: Prompt, count: int, generator: Generator) -> list[Prompt]:
    """Draw `count` different hard negatives of a prompt."""
    near = hard_negatives(prompt)
    return [near[i] for i in torch.randperm(len(near), generator=generator)[:count].tolist()]


def evaluator(each: int) -> Figures:
    """Measure how often the rules accept a clean render for its prompt, and for a hard negative of its prompt."""
    prompts = even_prompts("heldout", each)
    images, generator = renders(prompts, 11), Generator().manual_seed(12)
    wrong = [negatives(prompt, 1, generator)[0] for prompt in prompts]
    return {
        "n": len(prompts),
        "right_on_renders": judge(images, prompts).table()["overall"][0],
        "false_accepts": judge(images, wrong).table()["overall"][0],
    }


def autoencoder(vae: Any, each: int) -> Figures:
    """Measure how often the rules accept reconstructions, their junk, and the mean absolute error of a pixel."""
    prompts = even_prompts("heldout", each)
    images = renders(prompts, 13)
    with torch.no_grad():
        rebuilt = torch.cat([reconstructions(vae, part) for part in images.split(128)])
    verdict = judge(rebuilt, prompts)
    error = float((rebuilt - images).abs().mean())
    return {
        "n": len(prompts),
        "right": verdict.table()["overall"][0],
        "junk": float(verdict.junk.mean()),
        "pixel_error": error,
    }


def draw(pipe: Any, prompts: list[Prompt], steps: int, seed: int, batch: int = 120, **more: Any) -> Tensor:
    """Sample one picture for each prompt by the pipeline's own call, Float[prompts 3 32 32] in [0, 1].

    `more` are arguments of the call, such as guidance_scale.
    """
    generator = Generator().manual_seed(seed)
    parts = [[prompt.text for prompt in prompts[i : i + batch]] for i in range(0, len(prompts), batch)]
    options: dict[str, Any] = {"num_inference_steps": steps, "generator": generator, "output_type": "pt", **more}
    return torch.cat([pipe(part, **options).images for part in parts]).float()


def score_base(verdict: Verdict) -> Figures:
    """Return the rule-based score of samples per category and overall, and their junk."""
    table = {category: share for category, (share, _) in verdict.table().items()}
    return {**table, "n": len(verdict.prompts), "junk": float(verdict.junk.mean())}


def against_negatives(reward: Any, each: int, split: Split = "heldout") -> Figures:
    """Measure how often a correct render's score beats each of three hard negatives', per category."""
    prompts, generator = even_prompts(split, each), Generator().manual_seed(14)
    images = renders(prompts, 15)
    rivals = [negatives(prompt, 3, generator) for prompt in prompts]
    scores = reward(images, prompts)
    negative_scores = torch.stack([reward(images, [rival[i] for rival in rivals]) for i in range(3)]).amax(0)
    ahead = scores > negative_scores
    shares = {c: float(ahead[torch.tensor([p.category == c for p in prompts])].float().mean()) for c in CATEGORIES}
    overall = float(ahead.float().mean())
    return {**shares, "overall": overall, "n": len(prompts), "render_mean": float(scores.mean()), **_quantiles(scores)}


def _quantiles(scores: Tensor) -> Figures:
    return {f"render_q{q:02d}": float(scores.quantile(q / 100)) for q in (5, 20, 50, 80, 95)}


def roc_area(scores: Tensor, correct: Tensor) -> float:
    """Return the area under the ROC curve: the chance that a correct sample scores above a wrong one, or NaN."""
    good, bad = scores[correct], scores[~correct]
    if not len(good) or not len(bad):
        return float("nan")
    gaps = good[:, None] - bad[None, :]
    return float(((gaps > 0).float() + 0.5 * (gaps == 0).float()).mean())


def ranking(scores: Tensor, verdict: Verdict) -> Figures:
    """Measure how well the reward ranks samples by correctness: over all, and within a category, on average."""
    kinds = [torch.tensor([p.category == c for p in verdict.prompts]) for c in CATEGORIES]
    within = [roc_area(scores[kind], verdict.correct[kind]) for kind in kinds if bool(kind.any())]
    areas = torch.tensor(within).nan_to_num(-1)
    return {
        "area": roc_area(scores, verdict.correct),
        "area_within_categories": float(areas[areas >= 0].mean()),
        "correct_mean": float(scores[verdict.correct].mean()),
        "incorrect_mean": float(scores[~verdict.correct].mean()),
    }


def leap_distances(pipe: Any, prompts: Sequence[Any], steps: int, seed: int, **more: Any) -> Figures:
    """Return the mean of |x_j - leap from x_k| over all k > j of the sampler's run: the length to compare tau with.

    `more` are arguments of the call, such as guidance_scale.
    """
    recorded: list[tuple[Tensor, Tensor]] = []
    scheduler, generator = pipe.scheduler, Generator().manual_seed(seed)
    original_step = type(scheduler).step

    def record_step(self: Any, velocity: Tensor, t: Any, sample: Tensor, **options: Any) -> Any:
        recorded.append((sample, velocity))
        return original_step(self, velocity, t, sample, **options)

    scheduler.step = record_step.__get__(scheduler)
    try:
        options: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": generator,
            "output_type": "latent",
            **more,
        }
        final = pipe([prompt.text for prompt in prompts], **options)[0]
    finally:
        del scheduler.step
    points, sigmas = [x for x, _ in recorded] + [final], scheduler.sigmas
    lengths: list[Tensor] = []
    for k in range(steps):
        for j in range(k + 2, steps + 1):
            leap = points[k] - (sigmas[k] - sigmas[j]) * recorded[k][1]
            lengths.append((leap - points[j]).abs().flatten(1).mean(1))
    distances = torch.cat(lengths)
    quantiles = {f"q{q:02d}": float(distances.quantile(q / 100)) for q in (5, 25, 50, 75, 95)}
    return {"mean": float(distances.mean()), **quantiles, "latent_mean_abs": float(final.abs().mean())}
