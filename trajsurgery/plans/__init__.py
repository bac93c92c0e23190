"""The language of plans, without tensors: nodes, legality, closed forms, notation, pictures.

expression.py      hash-consed expression nodes: structurally equal nodes are one object
nodes.py           the primitives: leap, connect, discount, ...
interpolants.py    x_t = alpha_t x_0 + beta_t x_1, and coefficients of leaps and quadratures
graph.py           the DAG: where gradients flow, which values the rollout records
rules.py, legality.py    the rules of the language, and the check of a plan against them
notation.py        the paper's arrows, and the code that builds a plan
derivatives.py, closed_form.py, formula.py    the gradient as a sum of terms, and how it is printed
plan.py, per_sample.py   `Plan`, `PerSample`
drawing/           pictures of plans

It imports `errors` alone, and no torch.
"""
