"""Rewards: `reward(images, prompts) -> scores`, images Float[batch 3 h w] in [0, 1], differentiable in them.

Each states its name, its scale, and the `threshold` (lambda of the hinge) that fits it.
"""
