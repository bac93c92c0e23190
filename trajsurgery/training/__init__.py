"""Training: from a recipe to tuned weights, with one loop for all methods.

recipe.py, settings.py         a run as one frozen value
presets.py, method_names.py    the demo's settings, the paper's, those for one card; methods by name
components.py, prompts.py      loads pipeline, rewards and prompts; prompt files
objective.py, srpo_support.py  the loss; SRPO's rewards and guidance
step_gradient.py               the gradient of one rollout
training_loop.py, endings.py   the loop; how a run ends that failed
optimisers.py, averages.py     AdamW and others by name; moving averages of the weights
anchor.py, early_stopping.py   penalty against drift; when to stop
progress_bar.py                how much is done and the time left, on a terminal or in a log

model/        how the model is loaded, kept, run and decoded
encodings/    prompts encoded once
distributed/  several processes; FSDP or copies
checkpoints/  what a run writes so that it can go on
checks/       before a run: settings, files, hardware, one model call
faults/       what can go wrong, found and named
noise/        ReNO: optimise the noise of one prompt

It may import everything up to `rewards`, and nothing of evaluation or runs.
"""
