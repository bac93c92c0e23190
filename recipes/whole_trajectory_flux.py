"""Backpropagation through the whole trajectory on Flux, in the memory of one model call. Runs on a CPU."""

import sys
from dataclasses import replace

from trajsurgery import WholeTrajectory
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = {
    name: replace(recipe, rollout=replace(recipe.rollout, memory="staged"))
    for name, recipe in presets(WholeTrajectory(), "outputs/whole_trajectory_flux").items()
}

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
