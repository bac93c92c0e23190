"""What is checked before a run: preflight.py settings, files and hardware; trial.py one real model call, both ways.

It may import everything of training.
"""
