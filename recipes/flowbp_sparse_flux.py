"""FlowBP-Sparse on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys

from trajsurgery import FlowBPSparse
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(FlowBPSparse(active=3), "outputs/flowbp_sparse_flux")

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
