"""Encoded prompts, made once.

prompt_cache.py         what a run calls: encodings in memory or in a folder
cached_encoder.py       an `encode_prompt` that looks prompts up
result_layout.py        how the encodings of several prompts are joined to a batch
encoding_folder.py      encodings on disk, shared by ranks and later runs
encoder_fingerprint.py  what determines an encoding, as a hash

It may import `distributed` of training.
"""
