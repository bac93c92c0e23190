"""A run's weights in the forms that others take, with a model card.

forms.py       a diffusers folder, a merged transformer, LoRA for diffusers, LoRA for ComfyUI
model_card.py  README.md, as the hub shows it
upload.py      to the hub

It may import everything up to `runs/reports`.
"""
