"""Surgery on unmodified diffusers pipelines. No class of pipeline is named anywhere.

operate.py           `operate(pipe, plan)`
denoising_loop.py    follows the pipeline's loop, step by step
scheduler.py         which schedulers are flow matching, and the times of their steps
guidance.py          classifier-free guidance: which passes keep their gradient
call_record.py, timestep_inputs.py    what one call was made with
replay.py, pipeline_field.py          the pipeline as a velocity field: its call, replayed for one timestep

It may import `plans`, `surgery` and `errors`.
"""
