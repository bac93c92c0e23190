"""The paper's experiments on the embedded world. Run as `python -m benchmarks.study.study`.

Scripts:
- study.py: Table 2, all methods under one budget
- ablations.py: Fig. 4, Fig. 6 and Table 5
- steps.py: which of the sampler's steps carry what a method learned
- cost.py: seconds and memory of an iteration of every method
- guards.py: guards on a reward that invites hacking
- variance.py: several plans per rollout, and per-sample times

Shared by study.py, ablations.py and steps.py:
- methods.py: methods, rates, recipes; runs.py: one resumable run; worker_pool.py: runs side by side
- seed_statistics.py: means, intervals and paired differences over seeds; findings.py: the paper's claims tested on them
- report.py, tables.py, pictures.py: study.json, its Markdown, its pictures

Parts of one script:
- ablation_variants.py, ablation_terms.py, ablation_pictures.py: variants, gradient terms and picture of ablations.py
- variance_runs.py, variance_picture.py: trainings and picture of variance.py

Results lie in results/; the runs themselves in outputs/.
"""
