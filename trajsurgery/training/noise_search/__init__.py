"""Noise search (ReNO): a recipe, and gradient ascent of a reward in the initial noise of one prompt."""
