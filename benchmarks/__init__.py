"""Measurements, the study and the making of the embedded world: every figure in the documentation comes from here.

- demo: the demo's check, its settings, its seeds
- engine: time, memory and scaling of the library itself
- study: the paper's experiments on the embedded world
- world: training and measurement of the embedded world's weights
- provenance.py: command, versions, machine and commit, written beside every figure

Scripts run as modules from the root of the checkout: `python -m benchmarks.engine.overhead`, with `--help` for their
flags. Results lie in `benchmarks/*/results/`. `benchmarks/README.md` lists every script.
"""
