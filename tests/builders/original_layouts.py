"""Weights of diffusers' transformers in the layouts of their authors' own files."""

from __future__ import annotations

import torch
from torch import Tensor

_PARTS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def stable_diffusion_3(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return the weights of an SD3Transformer2DModel as Stability AI's sd3.5_medium.safetensors has them.

    The authors' files give shift before scale where diffusers has scale before shift: in the last norm, and in the last
    block's norm of the text.
    """
    rest, original = dict(state), dict[str, Tensor]()
    swapped = ("norm_out.linear.", f"transformer_blocks.{blocks - 1}.norm1_context.linear.")
    for name in [name for name in rest if name.startswith(swapped)]:
        rest[name] = torch.cat(rest[name].chunk(2)[::-1])
    names = dict(_PARTS)
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        names |= {ours + name: theirs + other for name, other in _BLOCK.items()}
        for joined, (one, *_) in _JOINED.items():
            for kind in ("weight", "bias"):
                if f"{ours}{one}.{kind}" in rest:
                    parts = [rest.pop(f"{ours}{part}.{kind}") for part in _JOINED[joined]]
                    original[f"{theirs}{joined}.{kind}"] = torch.cat(parts)
    for name, weight in rest.items():
        part, _, kind = name.rpartition(".")
        original[names[name] if name in names else f"{names[part]}.{kind}"] = weight
    return {f"model.diffusion_model.{name}": weight.contiguous() for name, weight in original.items()}
