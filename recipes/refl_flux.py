"""ReFL on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import ReFL
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(ReFL(last=11), "outputs/refl_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
