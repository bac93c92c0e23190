"""AlignProp on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import AlignProp
from trajsurgery.recipe import presets
from trajsurgery.run import cli

RECIPES = presets(AlignProp(), "outputs/alignprop_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
