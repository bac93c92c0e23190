"""DRaFT-1 on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import DRaFT1
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(DRaFT1(), "outputs/draft_1_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
