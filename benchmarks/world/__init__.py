"""The making of the embedded world `trajsurgery.tiny`. Run as `python -m benchmarks.world.train`.

- train.py: all training stages in order; stage.py: the resumable loop that each stage runs in
- fit_vae.py, fit_text.py, fit_flux.py, fit_scorer.py, fit_sd3.py, fit_wan.py: the stages
- flux_parts.py, sd3_parts.py, wan_parts.py, tokenizers.py, scorer_variants.py: the untrained models
- compose.py, motion_videos.py: training scenes and videos; layout.py: what each quadrant of a scene holds
- render.py: scenes to pixels
- hard_negatives.py, degradations.py: wrong prompts and degraded pictures for the reward
- measure.py, measure_sd3_wan.py, metrics.py: measurements of the weights, written beside them
- preview.py, preview_models.py: `python -m benchmarks.world.preview`, sheets of pictures by an embedded model

README.md tells what was varied and what came of it. Weights and figures lie in trajsurgery/tiny/weights.
"""
