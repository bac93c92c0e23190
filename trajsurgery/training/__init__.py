"""Training: from a recipe to tuned weights, with one loop for all methods.

recipe.py, settings.py, presets.py    a run as one frozen value; defaults are the demo's settings
preflight.py, model_folder.py         checks before anything is loaded
components.py                         loads pipeline, rewards and prompts
prompts.py, prompt_cache.py           prompt files; encodings, made once
vae_decoding.py, lora.py              decoding with gradient; what trains
objective.py, srpo_support.py         the loss; SRPO's rewards and guidance
step_gradient.py, training_loop.py    the gradient of a rollout; the loop
checkpoint.py, early_stopping.py      checkpoint content; early stopping
anchor.py, missing_gradients.py       penalty against drift; parameters without gradient
noise_search/                         ReNO: optimise the noise of one prompt

It may import everything up to `rewards`, and nothing of evaluation or reports.
"""
