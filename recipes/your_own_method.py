"""A method of your own: ten lines, and its proof in one (--prove). Else it trains the embedded tiny Flux with it."""

import sys
from dataclasses import dataclass

import torch

from trajsurgery import Plan, latent
from trajsurgery.cli.recipe_script import cli
from trajsurgery.testing import check_gradient
from trajsurgery.training.presets import presets


@dataclass(frozen=True)
class FadingLeaps:
    alpha: float = 0.5
    weights_at = "all"

    def draw(self, steps: int, generator: torch.Generator | None = None) -> Plan:
        k, j, i = sorted((1 + torch.randperm(steps, generator=generator)[:3]).tolist(), reverse=True)
        x = latent(k).leap(j).connect().leap(i, discount=self.alpha).connect()
        return Plan(x.leap(0, discount=self.alpha**2).connect(), steps=steps)


RECIPES = presets(FadingLeaps(), "outputs/your_own_method")

if __name__ == "__main__":
    sys.exit(print(check_gradient(FadingLeaps())) if "--prove" in sys.argv else cli(RECIPES, __doc__))
