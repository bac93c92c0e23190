"""LeapAlign on Wan, a video model, with a motion reward: the embedded tiny Wan, on a CPU.

A Wan of your own: --model FOLDER --reward MODULE:NAME --prompts FILE --heldout FILE, and its size and frames.
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow on a busy machine

from trajsurgery import LeapAlign
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import wan

RECIPES = wan(LeapAlign(alpha=0.3), "outputs/leapalign_wan")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
