"""Scores of the original packages: run `python -m tests.rewards.originals.record PACKAGE` where it is installed.

Prints JSON; `recorded.json` holds the outputs with the versions. The packages pin versions that exclude this library's
(transformers 4.45.2, timm 0.6.13, pytest 7.2, protobuf < 4), except imscore. Each runs unchanged, except that
hard-coded sizes and files that it would download are replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from tests.rewards.originals import imscore_scorers, layouts, small

Scores = dict[str, Any]


def open_pictures(folder: Path) -> dict[str, Any]:
    """The images as PIL reads them, by name."""
    return {path.stem: Image.open(path) for path in small.pictures(folder)}


def hpsv2(folder: Path) -> Scores:
    """`hpsv2.img_score.score` with a small model. Its wheel lacks CLIP's vocabulary: open_clip's is copied into it."""
    import open_clip

    place = Path(importlib.metadata.distribution("hpsv2").locate_file("hpsv2/src/open_clip"))
    if not (place / "bpe_simple_vocab_16e6.txt.gz").exists():
        shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", place)
    from hpsv2 import img_score
    from hpsv2.src.open_clip import add_model_config

    file = small.hpsv2(folder)
    add_model_config(folder / "small-hps.json")
    model, _, preprocess = img_score.create_model_and_transforms(
        "small-hps", precision="amp", light_augmentation=True, output_dict=True
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    pictures = open_pictures(folder)
    return {
        name: float(img_score.score(pictures[name], prompt, cp=str(file))[0])
        for name, prompt in zip(small.SIZES, small.PROMPTS)
    }


def imagereward(folder: Path) -> Scores:
    """`ImageReward.score` of image-reward with small towers."""
    import ImageReward  # noqa: F401  its name is a module's and a class's
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    file, size = small.imagereward(folder), small.BLIP_VISION

    def vit(*_: Any) -> tuple[Any, int]:
        depth, heads = size["num_hidden_layers"], size["num_attention_heads"]
        tower = VisionTransformer(224, 16, embed_dim=size["hidden_size"], depth=depth, num_heads=heads)
        return tower, size["hidden_size"]

    def words() -> Any:
        tokenizer = BertTokenizer(str(folder / "vocab.txt"))
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return tokenizer

    module = sys.modules["ImageReward.ImageReward"]
    head, width = module.MLP, small.BLIP_TEXT["hidden_size"]
    with contextlib.ExitStack() as stack:
        for where, name, to in ((blip_pretrain, "create_vit", vit), (blip_pretrain, "init_tokenizer", words)):
            stack.enter_context(mock.patch.object(where, name, to))
        stack.enter_context(mock.patch.object(module, "MLP", return_value=head(width)))
        model = module.ImageReward(med_config=str(folder / "med_config.json"), device="cpu")
    result = model.load_state_dict(torch.load(file), strict=False)
    assert not result.missing_keys and not result.unexpected_keys, result  # noqa: PT018
    model.eval()
    pictures = open_pictures(folder)
    return {name: float(model.score(prompt, pictures[name])) for name, prompt in zip(small.SIZES, small.PROMPTS)}


def hpsv3(folder: Path) -> Scores:
    """`HPSv3RewardInferencer.reward` of hpsv3, on a small Qwen2-VL."""
    import hpsv3 as package
    import yaml
    from hpsv3.dataset import data_collator_qwen as collator
    from hpsv3.inference import HPSv3RewardInferencer

    question = collator.INSTRUCTION.replace("{text_prompt}", "{prompt}") + collator.prompt_with_special_token
    file = small.hpsv3(folder, question)
    settings = yaml.safe_load((Path(package.__file__).parent / "config" / "HPSv3_7B.yaml").read_text())
    settings |= {"model_name_or_path": str(folder / "qwen"), "bf16": False, "torch_dtype": "float32"}
    settings |= {"report_to": "none", "output_dir": str(folder / "out"), "use_cpu": True}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    save_qwen(folder / "qwen")
    judge = HPSv3RewardInferencer(str(folder / "small.yaml"), str(file), device="cpu")
    pictures = open_pictures(folder)
    with torch.no_grad():  # the images differ in size, so that each is its own batch
        outputs = {n: judge.reward([pictures[n]], [p])[0].tolist() for n, p in zip(small.SIZES, small.PROMPTS)}
        pair = judge.reward([pictures["square"]] * 2, list(small.PROMPTS[:2]))
    scores = {name: mean for name, (mean, _) in outputs.items()}
    scores["the question's sha256"] = hashlib.sha256(question.encode()).hexdigest()
    scores |= {f"{name}, second output": second for name, (_, second) in outputs.items()}
    return scores | {"square, batch 0": float(pair[0, 0]), "square, batch 1": float(pair[1, 0])}


def save_qwen(folder: Path) -> None:
    """Write the base model's files beside the tokenizer's; the checkpoint replaces the weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    added_tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {row["content"]: int(number) for number, row in added_tokens.items()}
    config = Qwen2VLConfig(
        **small.QWEN_TEXT,
        vision_config=small.QWEN_VISION,
        vocab_size=max(ids.values()) + 400,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": small.SECTIONS},
        **{f"{name[2:-2].replace('_pad', '')}_token_id": ids[name] for name in names},
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056).save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": small.QWEN_TEMPLATE}))


def full_sizes() -> dict[str, str]:
    """Digests of the names and shapes of the packages' full-size models, on the meta device."""
    digests: dict[str, str] = {}
    with torch.device("meta"), contextlib.suppress(ImportError):
        from hpsv2.src.open_clip import create_model

        state = create_model("ViT-H-14", device="meta").state_dict()
        digests["hpsv2"] = layouts.digest({k: v.shape for k, v in state.items()})
    with torch.device("meta"), contextlib.suppress(ImportError):
        from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
        from transformers import Qwen2VLConfig

        size = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
        config = Qwen2VLConfig(**size, num_key_value_heads=4, vocab_size=151658, rope_scaling=scaling)
        config._attn_implementation = "sdpa"
        model = Qwen2VLRewardModelBT(config, output_dim=2, rm_head_type="ranknet")
        digests["hpsv3"] = layouts.digest({k: v.shape for k, v in model.state_dict().items()})
    return digests


ORIGINALS: dict[str, Callable[[Path], Scores]] = {"hpsv2": hpsv2, "image-reward": imagereward, "hpsv3": hpsv3}
ORIGINALS |= {"imscore": imscore_scorers.imscore}


def main() -> None:
    """Print the scores of the packages named on the command line."""
    torch.set_num_threads(1)
    recorded: dict[str, Any] = {}
    stacks = ("torch", "torchvision", "transformers", "timm", "pillow", "numpy")
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            scores = full_sizes() if name == "full sizes" else ORIGINALS[name](Path(folder))
        versions = {p: importlib.metadata.version(p) for p in (*((name,) if name in ORIGINALS else ()), *stacks)}
        recorded[name] = {"versions": versions, "scores": scores}
    print("\n" + json.dumps(recorded, indent=1))


if __name__ == "__main__":
    main()
