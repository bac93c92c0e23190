"""The world's scorers: the reward, and two that are not trained on, with other seeds, scenes and image towers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trajsurgery.tiny.pipe import TEXT_LENGTH
from trajsurgery.tiny.scene import SIDE


@dataclass(frozen=True)
class Variant:
    """Seeds and architecture of a scorer."""

    name: str
    """Name of its training stage and of its folder of weights."""
    model: str
    """Its name in open_clip's table of models."""
    tower: Mapping[str, Any]
    """open_clip's `vision_cfg`, all but the image size: a ViT, or a ResNet where `layers` is a list."""
    seed: int = 0
    """Seed of its initial weights; added to the training's seed."""
    data_seed: int = 0
    """Seed of its scenes, their degradation and its attacks; added to the training's seed."""

    def configuration(self, vocabulary: int) -> dict[str, Any]:
        """Return the open_clip model config: images of SIDE pixels, texts of TEXT_LENGTH tokens."""
        return {
            "embed_dim": 96,
            "vision_cfg": {"image_size": SIDE, **self.tower},
            "text_cfg": {
                "context_length": TEXT_LENGTH,
                "vocab_size": vocabulary,
                "width": 64,
                "heads": 4,
                "layers": 3,
                "no_causal_mask": True,
            },
        }


_VIT: dict[str, Any] = {"layers": 4, "width": 128, "head_width": 32, "patch_size": 8, "pool_type": "avg"}
_FINER_VIT: dict[str, Any] = {"layers": 3, "width": 96, "head_width": 24, "patch_size": 4, "pool_type": "avg"}
_RESNET: dict[str, Any] = {"layers": [2, 2, 1, 1], "width": 16, "head_width": 64}

REWARD = Variant("scorer", "trajsurgery-tiny", _VIT)
FURTHER = (
    Variant("scorer_b", "trajsurgery-tiny-b", _FINER_VIT, seed=100, data_seed=200),
    Variant("scorer_c", "trajsurgery-tiny-c", _RESNET, seed=300, data_seed=400),
)
VARIANTS = {variant.name: variant for variant in (REWARD, *FURTHER)}
