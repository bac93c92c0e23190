"""`--dry-run --fit 24GB`: print the cheapest setting of a recipe that fits a card, as a command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Console

from trajsurgery.dry_run.fit import Fit, fit, memory_words, parse_memory
from trajsurgery.dry_run.memory_plan import MemoryPlan
from trajsurgery.dry_run.savings import flags
from trajsurgery.training.recipe import Recipe


def search(recipe: Recipe, console: Console, command: Sequence[str]) -> MemoryPlan:
    """Search for the setting, print it or the nearest miss, and return its memory plan.

    Args:
        command: the whole command line.

    Raises:
        RecipeError: `recipe.fit` names no memory; no config of the model.
    """
    memory = parse_memory(recipe.fit or "")
    with console.status("settings are tried under fake tensors"):
        result = fit(recipe, memory)
    for line in _lines(recipe, result, command):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return result.plan


def _lines(recipe: Recipe, result: Fit, command: Sequence[str]) -> list[str]:
    card, gpus = memory_words(result.memory), recipe.hardware.gpus
    each = f" on each of {gpus} GPUs" if gpus > 1 else ""
    figures = f"{memory_words(result.plan.peak)} of {card}{each}"
    if not result.changes:
        return [f"It fits as it is: {figures}."]
    changes = [f"  {shown}    {says}" for says, shown in result.changes]
    start = f"As it is the recipe takes {memory_words(result.before.peak)}{each}."
    if result.plan.fits:
        head = f"{start} The cheapest setting that fits takes {figures}:"
        return [head, *changes, "Run it:", f"  {_command(recipe, result.recipe, command)}"]
    over = max(result.plan.held | result.plan.passing, key=lambda name: (result.plan.held | result.plan.passing)[name])
    head = f"{start} Nothing fits at {recipe.rollout.size or 'its own'} px. The nearest takes {figures}, with"
    most = f"Its greatest part is {over}."
    return [head, *changes, most, *_ways_out(recipe, result, command)]


def _ways_out(recipe: Recipe, result: Fit, command: Sequence[str]) -> list[str]:
    ways = [f"Ways out: a card with {memory_words(result.plan.peak)} that can be used"]
    if result.plan.gpus_needed:
        ways[0] += f", {result.plan.gpus_needed} such GPUs (torchrun --nproc-per-node {result.plan.gpus_needed})"
    if result.smaller is None:
        return [f"{ways[0]}, or a smaller model."]
    smaller, plan = result.smaller
    return [
        f"{ways[0]}, or images of {smaller.rollout.size} px, which take {memory_words(plan.peak)}:",
        f"  {_command(recipe, smaller, command)}",
    ]


def _command(before: Recipe, after: Recipe, command: Sequence[str]) -> str:
    """Return a command that trains `after`: the one that was given, without the search and with the new flags."""
    words = list[str]()
    for i, word in enumerate(command):
        if word not in ("--dry-run", "--fit") and not word.startswith("--fit=") and command[i - 1] != "--fit":
            words.append(word)
    if words[1:2] == ["plan-memory"]:
        words[1] = "train"
    return f"{shlex.join(words)} {' '.join(flags(before, after))}"
