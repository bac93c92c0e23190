"""SRPO on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import SRPO
from trajsurgery.recipe import presets
from trajsurgery.run import cli

RECIPES = presets(SRPO(), "outputs/srpo_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
