"""LeapAlign on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

from trajsurgery import LeapAlign
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(LeapAlign(alpha=0.3), "outputs/leapalign_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
