"""FlowBP-Lagrange on Flux. Without an argument: the embedded tiny Flux, on a CPU, in minutes."""

import sys
from dataclasses import replace

from trajsurgery import FlowBPLagrange
from trajsurgery.cli.recipe_script import cli
from trajsurgery.training.presets import presets

RECIPES = presets(FlowBPLagrange(alpha=0.1, scale=0.25), "outputs/flowbp_lagrange_flux")
RECIPES |= {
    name: replace(recipe, objective=replace(recipe.objective, tau=0.2))
    for name, recipe in RECIPES.items()
    if name != "tiny"
}

if __name__ == "__main__":
    sys.exit(cli(RECIPES, __doc__))
