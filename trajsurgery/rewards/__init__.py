"""Rewards: `reward(images, prompts) -> scores`, images Float[batch 3 h w] in [0, 1], differentiable in them.

contract.py                        the base class and its checks
hpsv2.py, hpsv3.py, clip.py, imagereward.py    HPSv2, HPSv3, PickScore, CLIPScore, aesthetic, ImageReward
judge.py                           models that answer in text
mixtures.py                        weighted sums, SRPO's relative reward
remote.py                          a reward in another process
preprocessing.py                   images to a model's input, with the originals' values
packaged.py, loading.py            names, loading by name
user_code.py                       users' own rewards and methods by name
weight_files.py                    finding weight files, and loading originals' state dicts

Each states its name, its scale, and the `threshold` (lambda of the hinge) that fits it.
"""
