"""DRTune on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import DRTune
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(DRTune(train=2, last=11), "outputs/drtune_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
