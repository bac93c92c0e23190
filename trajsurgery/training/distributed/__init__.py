"""Several processes: ranks.py asks and answers between them; sharding.py splits a model with FSDP or copies it.

It imports the recipe and its settings, and nothing else of training.
"""
