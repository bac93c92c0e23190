"""imscore's scorers on small models. imscore installs beside this library, so a test runs them too.

Names of models become folders, fixed sizes become small, and outputs of transformers 5 are unwrapped for it. Each image
is scored twice: as it is, through imscore's differentiable preprocessing, and as the 224 x 224 bytes of the authors'
PIL resize, which pass imscore's resize and crop unchanged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from tests.rewards.originals import small

Scorer = Callable[[torch.Tensor, list[str]], torch.Tensor]


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Any:
    """Replace attributes while imscore builds a model."""
    with contextlib.ExitStack() as stack:
        for where, name, to in changes:
            stack.enter_context(mock.patch.object(where, name, to))
        yield


def hpsv2(folder: Path) -> Any:
    """imscore.hps: open_clip's model."""
    import open_clip
    from imscore.hps import model as module

    file = small.hpsv2(folder)
    open_clip.add_model_config(folder / "small-hps.json")
    create = open_clip.create_model_and_transforms
    with replaced((module, "create_model_and_transforms", lambda *_, **further: create("small-hps", **further))):
        scorer = module.HPSv2()
    scorer.model.load_state_dict(torch.load(file)["state_dict"])
    return scorer


def pickscore(folder: Path) -> Any:
    """imscore.pickscore."""
    from imscore.pickscore import model as module

    with replaced((module.AutoProcessor, "from_pretrained", lambda _: clip_processor(folder))):
        scorer = module.PickScorer(str(small.clip(folder)))
    for name in ("get_image_features", "get_text_features"):
        method = getattr(scorer.model, name)
        setattr(scorer.model, name, lambda method=method, **arguments: method(**arguments).pooler_output)
    return scorer


def clipscore(folder: Path) -> Any:
    """imscore.preference: exp(logit_scale) times the cosine."""
    from imscore.preference import model as module

    with replaced((module.AutoProcessor, "from_pretrained", lambda _: clip_processor(folder))):
        return module.CLIPScore(str(small.clip(folder)))


def clip_processor(folder: Path) -> Any:
    """CLIP's processor with the small tokenizer and the numbers of openai's preprocessor_config.json."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    return CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer.from_pretrained(small.clip(folder)))


def aesthetic(folder: Path) -> Any:
    """imscore.aesthetic's LAION predictor."""
    from imscore.aesthetic import model as module

    kind = module.CLIPVisionModelWithProjection
    model = kind.from_pretrained(small.clip(folder))
    with replaced((kind, "from_pretrained", lambda _: model)):
        scorer = module.LAIONAestheticScorer()
    scorer.mlp.load_state_dict(torch.load(small.aesthetic(folder)))
    return scorer


def imagereward(folder: Path) -> Any:
    """imscore.imreward: imscore's ViT and BERT."""
    from imscore.imreward import model as module

    file, vision, text = small.imagereward(folder), small.BLIP_VISION, small.BLIP_TEXT
    config = module.BertConfig(**json.loads((folder / "med_config.json").read_text()))
    size = {
        "embed_dim": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
    }
    vit, tokenizer = module.VisionTransformer, module.BertTokenizer(vocab={w: i for i, w in enumerate(small.WORDS)})
    # imscore reads this attribute, which transformers 5 removed
    tokenizer.__dict__["additional_special_tokens_ids"] = [len(small.WORDS) + 1]
    with replaced(
        (module, "VisionTransformer", lambda **_: vit(img_size=vision["image_size"], patch_size=16, **size)),
        (module, "BLIP", partial(module.BLIP, vision_width=vision["hidden_size"])),
        (module, "MLP", lambda _, mlp=module.MLP: mlp(text["hidden_size"])),
        (module.BertConfig, "from_dict", lambda _: config),
        (module.BertTokenizer, "from_pretrained", lambda _: tokenizer),
    ):
        scorer = module.ImageReward()
    result = scorer.load_state_dict(torch.load(file), strict=False)
    assert not result.missing_keys, result
    return scorer


SCORERS: dict[str, Callable[[Path], Any]] = {
    "hpsv2": hpsv2,
    "pickscore": pickscore,
    "clipscore": clipscore,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
}


def pil_pixels(size: str) -> torch.Tensor:
    """The bytes that the authors' PIL transform makes of an image, as floats [1, 3, 224, 224]."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    change = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), PILToTensor()])
    return change(Image.fromarray(small.picture(size)))[None].float() / 255


@torch.no_grad()
def imscore(folder: Path) -> dict[str, Any]:
    """Return {scorer: {"own pixels": {size: score}, "PIL's pixels": {size: score}}}."""
    scores: dict[str, Any] = {}
    for name, make in SCORERS.items():
        scorer = make(folder).eval()
        pairs = list(zip(small.SIZES, small.PROMPTS))
        pixels = {s: torch.from_numpy(small.picture(s)).permute(2, 0, 1)[None].float() / 255 for s in small.SIZES}
        scores[name] = {
            "own pixels": {size: float(scorer.score(pixels[size], [text])) for size, text in pairs},
            "PIL's pixels": {size: float(scorer.score(pil_pixels(size), [text])) for size, text in pairs},
        }
    return scores
