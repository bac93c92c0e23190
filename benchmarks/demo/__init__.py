"""The demo: `make demo` fine-tunes the embedded Flux with LeapAlign. Run as `python -m benchmarks.demo.check_demo`.

- check_demo.py: check a finished demo's figures and files
- choose_settings.py: runs on validation prompts, from which the demo's settings were chosen
- demo_seeds.py: the demo on three other seeds, for Flux, SD3 and Wan

Results lie in results/; the runs themselves in outputs/.
"""
