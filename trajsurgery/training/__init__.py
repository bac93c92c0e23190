"""Training: from a recipe to tuned weights, with one loop for all methods.

recipe.py, settings.py                a run as one frozen value
presets.py                            the demo's settings, the paper's, and those for one card
method_names.py                       methods by name, users' own too
preflight.py, model_folder.py         checks before anything is loaded
trial.py                              one model call forward and backward before a run
components.py                         loads pipeline, rewards and prompts
ranks.py, sharding.py                 several processes; FSDP or copies
precision.py, attention.py            what weights are kept in; attention kernels
compilation.py                        torch.compile of blocks, decoder and image tower
optimisers.py, averages.py            AdamW and others by name; moving averages of the weights
prompts.py, prompt_cache.py           prompt files; encodings, made once
cached_encoder.py, result_layout.py   an encoder that looks prompts up; how encodings of a batch are joined
encoding_folder.py                    encodings on disk, shared by ranks and later runs
encoder_fingerprint.py                what determines encodings, as a hash
vae_decoding.py, lora.py              decoding with gradient; what trains
objective.py, srpo_support.py         the loss; SRPO's rewards and guidance
step_gradient.py, training_loop.py    the gradient of a rollout; the loop
training_state.py, early_stopping.py  what changes in a run; early stopping
checkpoint.py, tensor_folder.py       checkpoints; folders of tensors, sharded or not
output_files.py, run_log.py           atomic files, the run's lock, disk errors; metrics.jsonl
bad_numbers.py, loss_range.py         numbers that are not finite; since when the loss is out of its range
endings.py, memory_errors.py          how a run ends that failed; out of memory
anchor.py, missing_gradients.py       penalty against drift; parameters without gradient
progress_bar.py                       how much is done and the time left, on a terminal or in a log
noise_recipe.py, noise_search.py      ReNO: optimise the noise of one prompt

It may import everything up to `rewards`, and nothing of evaluation or reports.
"""
