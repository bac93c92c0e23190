"""The model that is trained: how it is loaded, kept, run and decoded.

pipeline_loading.py, model_folder.py  from a repository's name, a folder or files to a pipeline
precision.py, lora.py                 what the weights are kept in; which of them train
attention.py, compilation.py          attention kernels; torch.compile of blocks, decoder and image tower
vae_decoding.py                       from latents to images, with gradient

It may import the recipe, its settings, `faults` and `distributed` of training.
"""
