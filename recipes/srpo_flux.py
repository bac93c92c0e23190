"""SRPO on Flux, with its relative reward: --method.positive and --method.negative are its control words."""

import sys
from dataclasses import replace

from trajsurgery import SRPO
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

WORDS = ("Natural-lighting", "Detail", "Detailed", "Real"), ("Concept art", "Painting", "Anime", "Flat", "Oil")
# The words are for HPSv2.1: the embedded scorer reads its own prompts alone, and its Flux has no guidance.
LARGE = SRPO(*WORDS, rollout_guidance=1.0)
RECIPES = {
    name: replace(
        recipe,
        method=SRPO() if name == "tiny" else LARGE,
        objective=replace(recipe.objective, threshold=0.7),
    )
    for name, recipe in presets(SRPO(), "outputs/srpo_flux").items()
}

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
