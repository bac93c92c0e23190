"""The library itself: time, memory, scaling, pipelines, mutants. Run as `python -m benchmarks.engine.overhead`.

- overhead.py: `operate` against a hand-written loop; leapalign_iteration.py: the iterations that it compares
- memory.py: memory of full backpropagation in five ways of running
- decode.py: memory of decoding with gradient
- scaling.py: cost of planning against the size of the plan
- pipelines.py: `operate` on 40 diffusers pipelines
- mutants.py: share of mutants that the tests kill; cosmic_ray_mutants.py: the mutants; forked_tests.py: runs the tests
- gpu.py: agreement, seconds and memory of real-size models on a GPU; gpu_models.py, gpu_measure.py, gpu_sections.py,
  gpu_recipe.py: its models, meters, sections and recipe run

Results lie in results/.
"""
