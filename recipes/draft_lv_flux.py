"""DRaFT-LV on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import DRaFTLV
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(DRaFTLV(n=2), "outputs/draft_lv_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
