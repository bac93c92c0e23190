"""`trajsurgery evaluate`: images of several models from the same prompts and noise, their scores, side by side."""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from trajsurgery import tiny
from trajsurgery.errors import RecipeError
from trajsurgery.evaluation.comparison_table import Comparison, csv_of, markdown, table
from trajsurgery.evaluation.geneval_folders import Sample, make, missing, samples, write_rows
from trajsurgery.evaluation.held_out import spread
from trajsurgery.evaluation.model_variants import ModelVariant, base, run_of, versions
from trajsurgery.evaluation.options import Evaluate
from trajsurgery.evaluation.picture_scores import Picture, about, scores
from trajsurgery.rewards.by_name import Reward, ask, scorer
from trajsurgery.training.checkpoint import write_whole
from trajsurgery.training.components import quiet
from trajsurgery.training.preflight import lacking_reward
from trajsurgery.training.prompts import Prompt, read_prompts
from trajsurgery.training.recipe import EMBEDDED

SETTINGS, FIGURES = "settings.json", "evaluation.json"
RULES = "rules"
"""The name of the embedded world's verdict among the scores: 1 for right, 0 for wrong."""


def run(given: Evaluate, console: Console) -> int:
    """The command; returns the exit code.

    Raises:
        RecipeError, RewardError: what does not fit, before an image is made.
    """
    prompts, chosen = _prompts(given), versions(given)
    call = _call(given)
    rewards = _rewards(given, chosen, call)
    asked = samples(prompts, given.images, given.seed)
    _settle(given, chosen, call, asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for version in chosen:
        _images(given, version, call, asked, console)
    found = {version.name: dict[str, list[float]]() for version in chosen}
    for name, reward in rewards.items():
        _moved(reward, device)
        for version in chosen:
            pictures = [Picture(s.path(given.output / version.name), s.prompt.text) for s in asked]
            with _progress(console, f"{name} of {version.name}", len(pictures)) as done, torch.no_grad():
                found[version.name][name] = scores(reward, pictures, device, given.batch, done)
        _moved(reward, torch.device("cpu"))
    standing = Comparison(tuple(v.name for v in chosen), tuple(rewards), asked, found)
    _write(given, chosen, call, standing, {name: about(reward) for name, reward in rewards.items()})
    console.print(table(standing), highlight=False)
    console.print(f"In {given.output}: {FIGURES}, table.md, scores.csv, {', '.join(v.name + '/' for v in chosen)}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    return 0


def _prompts(given: Evaluate) -> tuple[Prompt, ...]:
    """What is asked of the models.

    Raises:
        RecipeError: no such prompts; numbers below 1.
    """
    counts = {"images": given.images, "limit": given.limit, "steps": given.steps, "batch": given.batch}
    sizes = {"height": given.height, "width": given.width}
    wrong = [f"{name} = {n}: it is at least 1." for name, n in (counts | sizes).items() if n is not None and n < 1]
    wrong += [f"images = {given.images}: at most {2**16} of a prompt."] if given.images > 2**16 else []
    wrong += [f"seed = {given.seed}: it lies in [0, 2^23)."] if not 0 <= given.seed < 2**23 else []
    if wrong:
        raise RecipeError("\n".join(wrong))
    name, _, split = given.prompts.partition(":")
    if name == "tiny":
        if split not in ("", "validation", "heldout", "train"):
            raise RecipeError(f"prompts = {given.prompts}: the embedded world has tiny, tiny:validation, tiny:train.")
        found = tuple(Prompt(p.text, p.category) for p in tiny.prompts(split or "heldout"))
    else:
        found = read_prompts(given.prompts)
    return tuple(found if given.limit is None else spread(found, min(given.limit, len(found))))


def _rewards(given: Evaluate, chosen: Sequence[ModelVariant], call: dict[str, Any]) -> dict[str, Reward]:
    """The scorers by name, on the CPU; each is asked once, so that what it lacks is told before images are made.

    Raises:
        RecipeError, RewardError: one is not there, or gives no score an image.
    """
    names = dict.fromkeys(given.reward)
    lacking = [said for name in names if (said := lacking_reward(name))]
    if lacking or not names:
        raise RecipeError("\n".join(lacking) or "no reward to compare by: name some with --reward NAME.")
    cpu, found = torch.device("cpu"), dict[str, Reward]()
    with quiet():
        for name in names:
            found[name] = scorer(name, cpu)
    embedded = all(v.kind != "model" or v.where in ("tiny", "tiny:sd3") for v in chosen)
    if given.prompts.partition(":")[0] == "tiny" and embedded:
        found[RULES] = lambda images, texts: tiny.judge(images, list(texts)).correct.float()
    side = 32 if base(given) in EMBEDDED else 224
    grey = torch.full((1, 3, call.get("height", side), call.get("width", side)), 0.5)
    for name in names:
        with torch.no_grad():
            ask(name, found[name], grey, "a red circle")
    return found


def _call(given: Evaluate) -> dict[str, Any]:
    """What the pipes are called with: as asked, else as the run that is compared was evaluated, else their own."""
    recipe = run_of(given)
    rollout, evaluation = recipe.get("rollout", {}), recipe.get("evaluation", {})
    side = rollout.get("size")
    found = {
        "num_inference_steps": given.steps or evaluation.get("steps", 50),
        "guidance_scale": rollout.get("guidance") if given.guidance is None else given.guidance,
        "height": given.height or side,
        "width": given.width or rollout.get("width") or side,
    }
    return {name: value for name, value in found.items() if value is not None}


def _settle(given: Evaluate, chosen: Sequence[ModelVariant], call: dict[str, Any], asked: Sequence[Sample]) -> None:
    """Notes what images the folder holds; or checks that it holds these.

    Raises:
        RecipeError: it holds others, which would be mixed with these.
    """
    rows = json.dumps([[s.prompt.text, s.prompt.category, s.seed] for s in asked]).encode()
    here: dict[str, Any] = {
        "model": base(given),
        "call": call,
        "precision": given.precision,
        "batch": given.batch,
        "images": given.images,
        "seed": given.seed,
        "prompts": f"{given.prompts}, {hashlib.sha256(rows).hexdigest()}",
        "weights": {version.name: version.fingerprint() for version in chosen},
    }
    path, weights = given.output / SETTINGS, here["weights"]
    if path.is_file() or any(next((given.output / name).glob("*/samples"), None) for name in weights):
        there = _noted(path)
        known = there.pop("weights", {})
        plain = {name: value for name, value in here.items() if name != "weights"}
        changed = [f"{n}: {there.get(n)} there, {v} here" for n, v in plain.items() if there.get(n) != v]
        changed += [f"{n}: other weights than these" for n in weights if n in known and known[n] != weights[n]]
        if changed and not given.overwrite:
            raise RecipeError(
                f"{given.output} holds images of another evaluation. It differs in\n  " + "\n  ".join(changed)
                + "\nPass --overwrite to discard them, or --output with another folder."
            )  # fmt: skip
        if given.overwrite:
            _discard(given.output, {**known, **weights})
        else:
            here["weights"] = {**known, **weights}
    text = json.dumps(here, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _noted(path: Path) -> dict[str, Any]:
    """What an earlier evaluation noted of its images; {} if it can't be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _discard(output: Path, names: Sequence[str] | dict[str, Any]) -> None:
    """Removes the images of an earlier evaluation, and nothing else."""
    for name in names:
        for folder in (output / name).glob("[0-9]" * 5):
            shutil.rmtree(folder)


def _images(
    given: Evaluate, version: ModelVariant, call: dict[str, Any], asked: list[Sample], console: Console
) -> None:
    """The images of one model, which is loaded only if some are not there."""
    folder = given.output / version.name
    write_rows(folder, asked)
    left = sum(len(part) for part in missing(folder, asked, given.batch))
    if not left:
        return
    with console.status(f"loading {version.where}"):
        pipe = version.load(base(given), given.precision)
    takes = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in call if name not in takes]
    if unknown and any(getattr(given, {"guidance_scale": "guidance"}.get(name, name), None) for name in unknown):
        raise RecipeError(f"{type(pipe).__name__} takes no {', '.join(unknown)}: leave it out.")
    with _progress(console, f"images of {version.name}", len(asked), len(asked) - left) as done:
        make(pipe, {n: v for n, v in call.items() if n in takes}, folder, asked, given.batch, done)
    del pipe
    gc.collect()
    torch.cuda.empty_cache()


def _moved(reward: Reward, device: torch.device) -> None:
    if isinstance(reward, nn.Module):
        reward.to(device)


@contextmanager
def _progress(console: Console, said: str, total: int, completed: int = 0) -> Generator[Any]:
    """A bar; a plain line every tenth where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task, count = progress.add_task(said, total=total, completed=completed), completed

        def done(more: int) -> None:
            nonlocal count
            before, count = count, count + more
            progress.update(task, completed=count)
            if not console.is_terminal and count * 10 // total > before * 10 // total:
                console.print(f"{said}: {count}/{total}", highlight=False)

        yield done


def _write(
    given: Evaluate, chosen: Sequence[ModelVariant], call: dict[str, Any], standing: Comparison, rewards: dict[str, Any]
) -> None:
    """evaluation.json, table.md and scores.csv."""
    models = {version.name: {"kind": version.kind, "where": version.where} for version in chosen}
    how = {"prompts": given.prompts, "call": call, "precision": given.precision, "batch": given.batch}
    figures = {"models": models, **how, "rewards": rewards, **standing.to_dict()}
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(given).items()}
    texts = {
        FIGURES: json.dumps({"asked": asked, **figures}, indent=1) + "\n",
        "table.md": markdown(standing),
        "scores.csv": csv_of(standing),
    }
    for name, text in texts.items():
        write_whole(given.output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
