"""LeapAlign on Stable Diffusion 3, with real guidance. Without an argument: the embedded tiny SD3, on a CPU."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

from trajsurgery import LeapAlign
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import sd3

RECIPES = sd3(LeapAlign(alpha=0.3), "outputs/leapalign_sd3")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
