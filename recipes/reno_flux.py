"""ReNO on Flux: the noise of one prompt climbs the reward, and shows its images on the way. Runs on a CPU."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.noise.noise_recipe import presets

RECIPES = presets("outputs/reno_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
