"""The rewards' originals: small checkpoints in their formats, their own packages' scores of them, and how to take those.

`recorded.json` holds what the packages `hpsv2`, `image-reward`, `hpsv3` and `imscore` gave, each in the environment that
it asks for; `record.py` made it.
"""
