"""What imscore's scorers give on small models: it installs beside ours, so that this runs live too.

Its names of models are folders here, its fixed sizes small, and the outputs of transformers 5 are unwrapped for it.
Each picture is scored twice: as it is, through imscore's own differentiable pixels, and as the 224 x 224 bytes that
the authors' PIL resize makes of it, which pass imscore's resize and crop unchanged.
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
def instead(*changes: tuple[Any, str, Any]) -> Any:
    """Attributes replaced while imscore builds a model."""
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
    made = open_clip.create_model_and_transforms
    with instead((module, "create_model_and_transforms", lambda *_, **further: made("small-hps", **further))):
        scorer = module.HPSv2()
    scorer.model.load_state_dict(torch.load(file)["state_dict"])
    return scorer


def pickscore(folder: Path) -> Any:
    """imscore.pickscore."""
    from imscore.pickscore import model as module

    with instead((module.AutoProcessor, "from_pretrained", lambda _: words(folder))):
        scorer = module.PickScorer(str(small.clip(folder)))
    for name in ("get_image_features", "get_text_features"):
        plain = getattr(scorer.model, name)
        setattr(scorer.model, name, lambda plain=plain, **given: plain(**given).pooler_output)
    return scorer


def clipscore(folder: Path) -> Any:
    """imscore.preference: exp(logit_scale) times the cosine."""
    from imscore.preference import model as module

    with instead((module.AutoProcessor, "from_pretrained", lambda _: words(folder))):
        return module.CLIPScore(str(small.clip(folder)))


def words(folder: Path) -> Any:
    """CLIP's processor: the small folder's tokenizer, and the numbers of openai's preprocessor_config.json."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    return CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer.from_pretrained(small.clip(folder)))


def aesthetic(folder: Path) -> Any:
    """imscore.aesthetic's LAION predictor."""
    from imscore.aesthetic import model as module

    kind = module.CLIPVisionModelWithProjection
    made = kind.from_pretrained(small.clip(folder))
    with instead((kind, "from_pretrained", lambda _: made)):
        scorer = module.LAIONAestheticScorer()
    scorer.mlp.load_state_dict(torch.load(small.aesthetic(folder)))
    return scorer


def imagereward(folder: Path) -> Any:
    """imscore.imreward: its own ViT and BERT."""
    from imscore.imreward import model as module

    file, see, read = small.imagereward(folder), small.BLIP_VISION, small.BLIP_TEXT
    config = module.BertConfig(**json.loads((folder / "med_config.json").read_text()))
    size = {"embed_dim": see["hidden_size"], "depth": see["num_hidden_layers"], "num_heads": see["num_attention_heads"]}
    vit, tokenizer = module.VisionTransformer, module.BertTokenizer(vocab={w: i for i, w in enumerate(small.WORDS)})
    tokenizer.__dict__["additional_special_tokens_ids"] = [len(small.WORDS) + 1]  # asked for, gone in transformers 5
    with instead(
        (module, "VisionTransformer", lambda **_: vit(img_size=see["image_size"], patch_size=16, **size)),
        (module, "BLIP", partial(module.BLIP, vision_width=see["hidden_size"])),
        (module, "MLP", lambda _, made=module.MLP: made(read["hidden_size"])),
        (module.BertConfig, "from_dict", lambda _: config),
        (module.BertTokenizer, "from_pretrained", lambda _: tokenizer),
    ):
        scorer = module.ImageReward()
    found = scorer.load_state_dict(torch.load(file), strict=False)
    assert not found.missing_keys, found
    return scorer


SCORERS: dict[str, Callable[[Path], Any]] = {
    "hpsv2": hpsv2,
    "pickscore": pickscore,
    "clipscore": clipscore,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
}


def fixed(size: str) -> torch.Tensor:
    """The bytes that the authors' PIL transform makes of a picture, as floats [1, 3, 224, 224]."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    change = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), PILToTensor()])
    return change(Image.fromarray(small.picture(size)))[None].float() / 255


@torch.no_grad()
def imscore(folder: Path) -> dict[str, Any]:
    """{scorer: {"own pixels": {size: score}, "PIL's pixels": {size: score}}}."""
    found: dict[str, Any] = {}
    for name, make in SCORERS.items():
        scorer = make(folder).eval()
        pairs = list(zip(small.SIZES, small.PROMPTS))
        own = {s: torch.from_numpy(small.picture(s)).permute(2, 0, 1)[None].float() / 255 for s in small.SIZES}
        found[name] = {
            "own pixels": {size: float(scorer.score(own[size], [text])) for size, text in pairs},
            "PIL's pixels": {size: float(scorer.score(fixed(size), [text])) for size, text in pairs},
        }
    return found
