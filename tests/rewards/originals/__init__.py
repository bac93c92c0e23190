"""The rewards' originals: small checkpoints in their formats, and what their own packages score.

`recorded.json` holds what the packages `hpsv2`, `image-reward`, `hpsv3` gave, each in
the environment that it asks for, and `imscore` in ours; `record.py` made it.
"""
