"""ReNO: optimise the noise of one prompt instead of weights: noise_recipe.py its settings, noise_search.py the search.

It may import the objective and the settings of training.
"""
