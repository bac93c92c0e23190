"""Small checkpoints in the formats of the original reward packages, and the packages' scores.

`recorded.json`, written by `record.py`, holds the scores of `hpsv2`, `image-reward` and `hpsv3`, each in the
environment that it pins, and of `imscore` in this library's environment.
"""
