"""Norm of every term of Eq. 10 on the embedded Flux, from the closed form.

Draws plans as training does, rolls out, and evaluates `plan.gradient()` term by term with the loss's own gradient at
the image: the single-step terms at j and k, and the nested term with alpha = 1. The whole gradient of any alpha follows
from them, as alpha scales the nested term alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.study.tables import row
from trajsurgery import leapalign, operate
from trajsurgery.surgery.api import distances
from trajsurgery.training import components, objective
from trajsurgery.training.checkpoints.checkpoint import saved_tensors
from trajsurgery.training.recipe import Recipe
from trajsurgery.training.training_loop import iteration_generator

ALPHAS = (0.0, 0.1, 0.3, 1.0)


def measure_terms(recipe: Recipe, draws: int, trained: Path | None, images: int = 16) -> list[dict[str, Any]]:
    """Return for each draw k, j, the norms of the three terms and of the whole gradient for each alpha, and a cosine.

    The cosine is the one between the single-step terms and the nested term.

    Args:
        recipe: LeapAlign's; its `rollout` and `objective` are used.
        trained: folder of a run, whose weights replace the untuned ones.
    """
    torch.set_num_threads(recipe.threads)
    run = components.load(recipe)
    parameters = [p for p in run.module.parameters() if p.requires_grad]
    if trained is not None:
        run.module.load_state_dict(saved_tensors(trained, "weights"), strict=False)
    embeddings = components.PromptCache(run.pipe, run.texts)
    return [_measure_draw(recipe, run, embeddings, parameters, number, images) for number in range(1, draws + 1)]


def _measure_draw(
    recipe: Recipe,
    run: components.RunComponents,
    embeddings: components.PromptCache,
    parameters: list[Any],
    number: int,
    images: int,
) -> dict[str, Any]:
    k, j = _draw_times(recipe, number)
    texts = run.draw(images, iteration_generator(recipe.seed, number, "prompts"))
    with operate(run.pipe) as surgery:
        run.pipe(
            num_inference_steps=recipe.rollout.steps,
            **components.pipeline_arguments(recipe),
            **embeddings(texts),
            generator=iteration_generator(recipe.seed, number, "noise"),
            output_type="latent",
        )
    plan, trajectory = leapalign(k, j, 1.0), surgery.trajectory
    x_0 = trajectory[0].detach().requires_grad_()
    score = run.reward(surgery.decode(x_0), texts)
    leap_distances = distances(plan, trajectory, surgery.field)
    weights = objective.weights(plan, trajectory, leap_distances, "all", recipe.objective.tau)
    loss = objective.loss([score], weights.w, components.hinge_threshold(recipe, run))
    (cotangent,) = objective.cotangents(loss, (x_0,))
    evaluation = plan.gradient().evaluate(trajectory, surgery.field, cotangent, parameters)
    terms = {
        _term_name(term, j): _flat(of) for term, of in zip(evaluation.expansion.terms, evaluation.terms, strict=True)
    }
    straight, nested = terms["single-step at j"] + terms["single-step at k"], terms["nested"]
    return {
        "k": k,
        "j": j,
        "sigmas": [float(trajectory.sigma(k)), float(trajectory.sigma(j))],
        "norms": {name: float(value.norm()) for name, value in terms.items()},
        "whole": {f"{alpha:g}": float((straight + alpha * nested).norm()) for alpha in ALPHAS},
        "cosine": _cosine(straight, nested),
    }


def _draw_times(recipe: Recipe, number: int) -> tuple[int, int]:
    """Return k > j, as the iteration of that number draws them."""
    drawn = recipe.method.draw(recipe.rollout.steps, iteration_generator(recipe.seed, number, "plan"))
    times = {node.t for node in drawn.nodes if type(node).__name__ == "Velocity"}
    k, j = sorted((t for t in times if isinstance(t, int)), reverse=True)
    return k, j


def _term_name(term: Any, j: int) -> str:
    if term.order:
        return "nested"
    return "single-step at j" if term.source == j else "single-step at k"


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def _cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else math.nan


def summarise_terms(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the draws, and the share of draws in which the nested term is the largest."""
    largest = [max(line["norms"], key=line["norms"].__getitem__) == "nested" for line in lines]
    return {
        "draws": len(lines),
        "norms": {name: statistics.median(line["norms"][name] for line in lines) for name in lines[0]["norms"]},
        "whole": {name: statistics.median(line["whole"][name] for line in lines) for name in lines[0]["whole"]},
        "cosine": statistics.median(line["cosine"] for line in lines),
        "nested largest": statistics.fmean(largest),
    }


def terms_table(summaries: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each model."""
    names = ["single-step at j", "single-step at k", "nested"]
    head = ["weights", *names, *(f"whole, alpha {a:g}" for a in ALPHAS), "cosine"]
    yield row(head)
    yield row(["---"] * len(head))
    for model, line in summaries.items():
        cells = [*(line["norms"][name] for name in names), *line["whole"].values(), line["cosine"]]
        yield row([model, *(f"{cell:.3g}" for cell in cells)])


def draw(lines: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the norms of the terms against the length of the first leap, a panel for each model."""
    figure = Figure(figsize=(4.6 * len(lines), 4), layout="constrained")
    colours = {"single-step at j": "#0b6e99", "single-step at k": "#e0a458", "nested": "#b3442e"}
    for axes, (model, model_lines) in zip(figure.subplots(1, len(lines), squeeze=False, sharey=True)[0], lines.items()):
        for name, colour in colours.items():
            leap_lengths = [line["sigmas"][0] - line["sigmas"][1] for line in model_lines]
            axes.plot(
                leap_lengths, [line["norms"][name] for line in model_lines], "o", color=colour, label=name, alpha=0.7
            )
        axes.set(title=model, xlabel="sigma_k - sigma_j", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel("norm of the term, alpha = 1")
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
