"""FlowBP-Bridge on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import FlowBPBridge
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(FlowBPBridge(active=5, alpha=0.1), "outputs/flowbp_bridge_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
