"""`trajsurgery evaluate`: make images with several models from the same prompts and noise, score and compare them."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from trajsurgery import tiny
from trajsurgery.errors import RecipeError
from trajsurgery.evaluation.comparison_table import Comparison, to_csv, to_markdown, to_table
from trajsurgery.evaluation.geneval_folders import Sample, list_samples, make_images, missing_samples, write_metadata
from trajsurgery.evaluation.held_out import spread_over_categories
from trajsurgery.evaluation.model_variants import BASE, ModelVariant, base_model, base_source, find_variants, run_recipe
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.evaluation.picture_scores import Picture, check_rewards, reward_facts, score_pictures
from trajsurgery.rewards.loading import Reward, load_reward, score_one
from trajsurgery.training.checkpoints.output_files import write_atomically
from trajsurgery.training.components import quiet
from trajsurgery.training.distributed.ranks import choose_device
from trajsurgery.training.progress_bar import progress_bar
from trajsurgery.training.prompts import Prompt, read_prompts, repetitions
from trajsurgery.training.recipe import EMBEDDED, changed_settings
from trajsurgery.training.settings import Rollout

SETTINGS, FIGURES = "settings.json", "evaluation.json"
RULES = "rules"
"""Name of the embedded world's verdict among the scores: 1 for right, 0 for wrong."""


def evaluate_models(options: Evaluate, console: Console) -> int:
    """Run the command; return the exit code.

    Raises:
        RecipeError, RewardError: invalid options, before an image is made.
    """
    device = choose_device(options.device)
    prompts, variants = _load_prompts(options), find_variants(options)
    if line := repetitions(options.prompts, [prompt.text for prompt in prompts]):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    call = _pipeline_arguments(options)
    rewards = _load_rewards(options, variants, call)
    samples = list_samples(prompts, options.images, options.seed)
    _record_or_check_settings(options, variants, call, samples)
    for variant in variants:
        _make_images(options, variant, call, samples, console)
    scores = {variant.name: dict[str, list[float]]() for variant in variants}
    for name, reward in rewards.items():
        for variant in variants:
            pictures = [Picture(s.path(options.output / variant.name), s.prompt.text) for s in samples]
            with progress_bar(console, f"{name} of {variant.name}", len(pictures)) as done:
                scores[variant.name][name] = score_pictures(reward, pictures, device, options.batch, done)
        if isinstance(reward, nn.Module):
            reward.cpu()
    comparison = Comparison(tuple(v.name for v in variants), tuple(rewards), samples, scores)
    facts = {name: reward_facts(reward) for name, reward in rewards.items()}
    _write_results(options, variants, call, comparison, facts)
    console.print(to_table(comparison), highlight=False)
    console.print(f"In {options.output}: {FIGURES}, table.md, scores.csv, {', '.join(v.name + '/' for v in variants)}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    return 0


def _load_prompts(options: Evaluate) -> tuple[Prompt, ...]:
    """Return the prompts to evaluate, once all numbers among the options are in their ranges."""
    counts = {n: getattr(options, n) for n in ("images", "limit", "steps", "batch", "height", "width")}
    wrong = [f"{name} = {n}: it is at least 1." for name, n in counts.items() if n is not None and n < 1]
    wrong += [f"images = {options.images}: at most {2**16} of a prompt."] if options.images > 2**16 else []
    wrong += [f"seed = {options.seed}: it lies in [0, 2^23)."] if not 0 <= options.seed < 2**23 else []
    if wrong:
        raise RecipeError("\n".join(wrong))
    name, _, split = options.prompts.partition(":")
    if name == "tiny":
        if split not in ("", "validation", "heldout", "train"):
            raise RecipeError(f"prompts = {options.prompts}: the embedded world has tiny, tiny:validation, tiny:train.")
        prompts = tuple(Prompt(p.text, p.category) for p in tiny.prompts(split or "heldout"))
    else:
        prompts = read_prompts(options.prompts)
    count = len(prompts) if options.limit is None else min(options.limit, len(prompts))
    return prompts if count == len(prompts) else tuple(spread_over_categories(prompts, count))


def _load_rewards(options: Evaluate, variants: Sequence[ModelVariant], call: dict[str, Any]) -> dict[str, Reward]:
    """Load the scorers on the CPU and score one image with each, so that they fail before images are made."""
    check_rewards(options.reward)
    with quiet():
        rewards = {name: load_reward(name, torch.device("cpu")) for name in options.reward}
    side = 32 if base_model(options) in EMBEDDED else 224
    grey = torch.full((1, 3, call.get("height", side), call.get("width", side)), 0.5)
    with torch.no_grad():
        for name, reward in rewards.items():
            score_one(name, reward, grey, "a red circle")
    embedded = all(v.kind != "model" or v.where in ("tiny", "tiny:sd3") for v in variants)
    if options.prompts.partition(":")[0] == "tiny" and embedded:
        rewards[RULES] = lambda images, texts: tiny.judge(images, list(texts)).correct.float()
    return rewards


def _pipeline_arguments(options: Evaluate) -> dict[str, Any]:
    """Return the pipeline's arguments: from the options, else the run that is compared, else the pipeline's own."""
    recipe = run_recipe(options)
    rollout, evaluation = recipe.get("rollout", {}), recipe.get("evaluation", {})
    side = rollout.get("size")
    arguments = {
        "num_inference_steps": options.steps or evaluation.get("steps", 50),
        "guidance_scale": rollout.get("guidance") if options.guidance is None else options.guidance,
        "height": options.height or side,
        "width": options.width or rollout.get("width") or side,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _record_or_check_settings(
    options: Evaluate, variants: Sequence[ModelVariant], call: dict[str, Any], samples: Sequence[Sample]
) -> None:
    """Write what the folder's images were made with, or raise RecipeError if it differs from this evaluation."""
    rows = json.dumps([[s.prompt.text, s.prompt.category, s.seed] for s in samples]).encode()
    source = base_source(options)
    settings: dict[str, Any] = {
        "model": source.name,
        "model_variant": source.variant,
        "transformer": source.transformer,
        "call": call,
        **{name: getattr(options, name) for name in ("precision", "batch", "images", "seed")},
        "prompts": f"{options.prompts}, {hashlib.sha256(rows).hexdigest()}",
        "compile": options.compile or None,  # which older folders do not name
    }
    weights = {variant.name: variant.fingerprint() for variant in variants}
    if source.transformer:
        weights["--transformer"] = ModelVariant(BASE, "transformer", source.transformer).fingerprint()
    saved_settings = _read_settings(options.output / SETTINGS)
    saved_weights = saved_settings.pop("weights", {})
    images = [folder for name in {**saved_weights, **weights} for folder in (options.output / name).glob("[0-9]" * 5)]
    if options.overwrite:
        for folder in images:
            shutil.rmtree(folder)
        saved_weights = {}
    elif images:
        changed = changed_settings(saved_settings, settings)
        changed += [f"{n}: other weights than these" for n, w in weights.items() if saved_weights.get(n, w) != w]
        if changed:
            raise RecipeError(
                f"{options.output} holds images of another evaluation. It differs in\n  " + "\n  ".join(changed)
                + "\nPass --overwrite to discard them, or --output with another folder."
            )  # fmt: skip
    text = json.dumps({**settings, "weights": {**saved_weights, **weights}}, indent=1) + "\n"
    write_atomically(options.output / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that an earlier evaluation saved; {} if they can't be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _make_images(
    options: Evaluate, variant: ModelVariant, call: dict[str, Any], samples: list[Sample], console: Console
) -> None:
    """Make one model's images; the model is loaded only if some are missing."""
    folder = options.output / variant.name
    write_metadata(folder, samples)
    missing = sum(len(part) for part in missing_samples(folder, samples, options.batch))
    if not missing:
        return
    with console.status(f"loading {variant.where}"):
        rollout = Rollout(precision=options.precision, compile=options.compile)
        pipe = variant.load(base_source(options), rollout, options.device)
    accepted = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in call if name not in accepted]
    if unknown and any(getattr(options, {"guidance_scale": "guidance"}.get(name, name), None) for name in unknown):
        raise RecipeError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: leave it out.")
    with progress_bar(console, f"images of {variant.name}", len(samples), len(samples) - missing) as done:
        make_images(pipe, {n: v for n, v in call.items() if n in accepted}, folder, samples, options.batch, done)
    del pipe
    gc.collect()
    torch.cuda.empty_cache()


def _write_results(
    options: Evaluate,
    variants: Sequence[ModelVariant],
    call: dict[str, Any],
    comparison: Comparison,
    rewards: dict[str, Any],
) -> None:
    """Write evaluation.json, table.md and scores.csv."""
    models = {variant.name: {"kind": variant.kind, "where": variant.where} for variant in variants}
    figures = {"options": asdict(options), "models": models, "call": call, "rewards": rewards, **comparison.to_dict()}
    texts = {
        FIGURES: json.dumps(figures, indent=1, default=str) + "\n",
        "table.md": to_markdown(comparison),
        "scores.csv": to_csv(comparison),
    }
    for name, text in texts.items():
        write_atomically(options.output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
