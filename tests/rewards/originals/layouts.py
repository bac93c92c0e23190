"""Names and shapes of the weights in the originals' files, derived from their modules, at any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def digest(shapes: Mapping[str, Any]) -> str:
    """Return one hash of all names and shapes."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def linear(shapes: Shapes, name: str, out: int, into: int | None = None, bias: bool = True) -> None:
    """Add a linear layer, or a norm if `into` is None."""
    shapes[f"{name}.weight"] = (out,) if into is None else (out, into)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def open_clip(size: Mapping[str, Any]) -> Shapes:
    """HPS_v2.1_compressed.pt: open_clip's CLIP in one of its configurations."""
    shapes, vision, text, joint = Shapes(), size["vision_cfg"], size["text_cfg"], size["embed_dim"]
    v, t, p = vision["width"], text["width"], vision["patch_size"]
    shapes["visual.class_embedding"], shapes["visual.proj"] = (v,), (v, joint)
    shapes["visual.positional_embedding"] = ((vision["image_size"] // p) ** 2 + 1, v)
    shapes["visual.conv1.weight"] = (v, 3, p, p)
    shapes["positional_embedding"], shapes["text_projection"] = (text["context_length"], t), (t, joint)
    shapes["token_embedding.weight"], shapes["logit_scale"] = (text["vocab_size"], t), ()
    for name, width in (("visual.ln_pre", v), ("visual.ln_post", v), ("ln_final", t)):
        linear(shapes, name, width)
    for prefix, width, layers in (("visual.", v, vision["layers"]), ("", t, text["layers"])):
        for n in range(layers):
            at = f"{prefix}transformer.resblocks.{n}."
            shapes[f"{at}attn.in_proj_weight"], shapes[f"{at}attn.in_proj_bias"] = (3 * width, width), (3 * width,)
            linear(shapes, f"{at}attn.out_proj", width, width)
            linear(shapes, f"{at}mlp.c_fc", 4 * width, width)
            linear(shapes, f"{at}mlp.c_proj", width, 4 * width)
            linear(shapes, f"{at}ln_1", width)
            linear(shapes, f"{at}ln_2", width)
    return shapes


def clip(vision: Mapping[str, int], text: Mapping[str, int], joint: int, position_ids: bool = False) -> Shapes:
    """model.safetensors of a CLIP in transformers' format; files of old versions hold position ids too."""
    shapes, v, t = Shapes(), vision["hidden_size"], text["hidden_size"]
    count = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    visual, textual = "vision_model.", "text_model."
    shapes["logit_scale"], shapes[f"{visual}embeddings.class_embedding"] = (), (v,)
    shapes[f"{visual}embeddings.patch_embedding.weight"] = (v, 3, vision["patch_size"], vision["patch_size"])
    shapes[f"{visual}embeddings.position_embedding.weight"] = (count, v)
    shapes[f"{textual}embeddings.position_embedding.weight"] = (text["max_position_embeddings"], t)
    shapes[f"{textual}embeddings.token_embedding.weight"] = (text["vocab_size"], t)
    if position_ids:
        shapes[f"{visual}embeddings.position_ids"] = (1, count)
        shapes[f"{textual}embeddings.position_ids"] = (1, text["max_position_embeddings"])
    for name, width in (("pre_layrnorm", v), ("post_layernorm", v)):
        linear(shapes, f"{visual}{name}", width)
    linear(shapes, f"{textual}final_layer_norm", t)
    linear(shapes, "visual_projection", joint, v, bias=False)
    linear(shapes, "text_projection", joint, t, bias=False)
    for prefix, size in ((visual, vision), (textual, text)):
        width, inner = size["hidden_size"], size["intermediate_size"]
        for n in range(size["num_hidden_layers"]):
            at = f"{prefix}encoder.layers.{n}."
            for part in "qkv":
                linear(shapes, f"{at}self_attn.{part}_proj", width, width)
            linear(shapes, f"{at}self_attn.out_proj", width, width)
            linear(shapes, f"{at}mlp.fc1", inner, width)
            linear(shapes, f"{at}mlp.fc2", width, inner)
            linear(shapes, f"{at}layer_norm1", width)
            linear(shapes, f"{at}layer_norm2", width)
    return shapes


def aesthetic(width: int = 768) -> Shapes:
    """sac+logos+ava1-l14-linearMSE.pth."""
    return _head("layers", (width, 1024, 128, 64, 16, 1))


def _head(name: str, widths: tuple[int, ...]) -> Shapes:
    shapes = Shapes()
    for number, (into, out) in zip((0, 2, 4, 6, 7), pairwise(widths)):  # dropouts take numbers
        linear(shapes, f"{name}.{number}", out, into)
    return shapes


def imagereward(vision: Mapping[str, int], text: Mapping[str, int]) -> Shapes:
    """ImageReward.pt: BLIP's ViT, its BERT, and five layers."""
    v, t, shapes = vision["hidden_size"], text["hidden_size"], Shapes()
    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    shapes[f"{vit}cls_token"], patches = (1, 1, v), (vision["image_size"] // 16) ** 2
    shapes[f"{vit}pos_embed"] = (1, patches + 1, v)
    shapes[f"{vit}patch_embed.proj.weight"], shapes[f"{vit}patch_embed.proj.bias"] = (v, 3, 16, 16), (v,)
    for n in range(vision["num_hidden_layers"]):
        linear(shapes, f"{vit}blocks.{n}.norm1", v)
        linear(shapes, f"{vit}blocks.{n}.attn.qkv", 3 * v, v)
        linear(shapes, f"{vit}blocks.{n}.attn.proj", v, v)
        linear(shapes, f"{vit}blocks.{n}.norm2", v)
        linear(shapes, f"{vit}blocks.{n}.mlp.fc1", 4 * v, v)
        linear(shapes, f"{vit}blocks.{n}.mlp.fc2", v, 4 * v)
    linear(shapes, f"{vit}norm", v)
    shapes[f"{bert}embeddings.position_ids"] = (1, text["max_position_embeddings"])
    shapes[f"{bert}embeddings.word_embeddings.weight"] = (text["vocab_size"], t)
    shapes[f"{bert}embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], t)
    linear(shapes, f"{bert}embeddings.LayerNorm", t)
    for n in range(text["num_hidden_layers"]):
        at = f"{bert}encoder.layer.{n}."
        for part, width in (("attention", t), ("crossattention", v)):
            linear(shapes, f"{at}{part}.self.query", t, t)
            linear(shapes, f"{at}{part}.self.key", t, width)
            linear(shapes, f"{at}{part}.self.value", t, width)
            linear(shapes, f"{at}{part}.output.dense", t, t)
            linear(shapes, f"{at}{part}.output.LayerNorm", t)
        linear(shapes, f"{at}intermediate.dense", text["intermediate_size"], t)
        linear(shapes, f"{at}output.dense", t, text["intermediate_size"])
        linear(shapes, f"{at}output.LayerNorm", t)
    linear(shapes, "blip.vision_proj", 256, v)
    linear(shapes, "blip.text_proj", 256, t)
    return shapes | _head("mlp.layers", (t, 1024, 128, 64, 16, 1))


def hpsv3(vision: Mapping[str, int], text: Mapping[str, int], words: int) -> Shapes:
    """HPSv3.safetensors: Qwen2-VL under the names of transformers 4.45, and a head; `words` tokens."""
    shapes, e, h, inner = Shapes(), vision["embed_dim"], text["hidden_size"], text["intermediate_size"]
    shapes["visual.patch_embed.proj.weight"] = (e, 3, 2, 14, 14)
    for n in range(vision["depth"]):
        at = f"visual.blocks.{n}."
        linear(shapes, f"{at}norm1", e)
        linear(shapes, f"{at}norm2", e)
        linear(shapes, f"{at}attn.qkv", 3 * e, e)
        linear(shapes, f"{at}attn.proj", e, e)
        linear(shapes, f"{at}mlp.fc1", vision["mlp_ratio"] * e, e)
        linear(shapes, f"{at}mlp.fc2", e, vision["mlp_ratio"] * e)
    linear(shapes, "visual.merger.ln_q", e)
    linear(shapes, "visual.merger.mlp.0", 4 * e, 4 * e)
    linear(shapes, "visual.merger.mlp.2", h, 4 * e)
    keys = h // text["num_attention_heads"] * text["num_key_value_heads"]
    for n in range(text["num_hidden_layers"]):
        at = f"model.layers.{n}."
        linear(shapes, f"{at}self_attn.q_proj", h, h)
        linear(shapes, f"{at}self_attn.k_proj", keys, h)
        linear(shapes, f"{at}self_attn.v_proj", keys, h)
        linear(shapes, f"{at}self_attn.o_proj", h, h, bias=False)
        linear(shapes, f"{at}mlp.gate_proj", inner, h, bias=False)
        linear(shapes, f"{at}mlp.up_proj", inner, h, bias=False)
        linear(shapes, f"{at}mlp.down_proj", h, inner, bias=False)
        linear(shapes, f"{at}input_layernorm", h, bias=False)
        linear(shapes, f"{at}post_attention_layernorm", h, bias=False)
    linear(shapes, "model.norm", h, bias=False)
    linear(shapes, "model.embed_tokens", words, h, bias=False)
    linear(shapes, "lm_head", words, h, bias=False)
    for number, (into, out) in zip((0, 3, 5), pairwise((h, 1024, 16, 2))):
        linear(shapes, f"rm_head.{number}", out, into)
    return shapes
