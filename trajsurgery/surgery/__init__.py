"""A plan on tensors: rollouts, and the plan's outputs with the plan's gradient, for any velocity field.

autograd_functions.py     connect, scale, gate, recompute, split: the only place that edits gradients
validation.py             checks of user input
parameters.py             what trains
trajectory.py             the recorded rollout
node_values.py            values of the primitives
velocity_calls.py         ways to make the model calls: retain, recompute, split
execution.py              one run of a plan, or of one for each sample
term_evaluation.py        the closed form, term by term
api.py                    rollout, sample, apply, values, distances, backward

It imports `plans` and `errors`.
"""
