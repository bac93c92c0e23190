"""Small pipelines of diffusers classes, one file per family, and the checks that each of them has to pass."""
